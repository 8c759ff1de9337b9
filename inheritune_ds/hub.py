"""Names on the Hugging Face hub: a name and revision to a full commit, a commit to files on disk."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inheritune_ds.errors import HubError

RepoType = Literal["model", "dataset"]

_TIMEOUT_S = 3.0
"""A machine without a network must hear so at once; the hub answers this question in well under 1 s."""


@dataclass(frozen=True)
class Repository:
    """A repository of the hub at one commit.

    Attributes:
        name: Such as `openlm-research/open_llama_3b`.
        repo_type: `model` or `dataset`.
        commit: Full commit, 40 hex digits.
        offline: Why the hub did not answer, so that only the local cache can be read; "" when it did.
    """

    name: str
    repo_type: RepoType
    commit: str
    offline: str


def resolve(name: str, revision: str, repo_type: RepoType) -> Repository:
    """Find the full commit of a revision: from the hub, or without a network from the local cache.

    Args:
        name: Hub id.
        revision: Commit, tag or branch. A full commit stands for itself.
        repo_type: `model` or `dataset`.

    Raises:
        HubError: No such repository or revision, no access, or neither network nor cache.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi()
    offline = ""
    try:
        api.repo_info(name, repo_type=repo_type, revision=revision, timeout=_TIMEOUT_S)
    except HFValidationError:
        raise HubError(
            f"{name!r} is neither an existing local folder nor a possible name on the hub",
            allowed="a local folder, or a hub id such as openai-community/gpt2",
            action="correct the name in the recipe",
        ) from None
    except GatedRepoError:
        raise HubError(
            f"the hub's {repo_type} {name} is gated: it is handed out only after its terms were accepted",
            action=f"accept the terms on its page, then `hf auth login` on this machine{_local_way_out(repo_type)}",
        ) from None
    except RevisionNotFoundError:
        raise HubError(
            f"the hub's {repo_type} {name} has no revision {revision!r}",
            allowed="a commit, tag or branch of that repository",
            action="correct revision in the recipe",
        ) from None
    except RepositoryNotFoundError:
        raise HubError(
            f"the hub has no {repo_type} {name!r}, or this machine may not see it",
            action="correct the name in the recipe; for a private one, `hf auth login` first",
        ) from None
    except Exception as error:  # noqa: BLE001  the HTTP client's error classes change between versions of the hub's library
        offline = first_line(error)
    try:
        commit = api.resolve_revision(name, repo_type=repo_type, revision=revision, local_files_only=bool(offline))
    except Exception as error:  # noqa: BLE001  as above; whatever it was, the commit is not known
        raise _unreachable(name, repo_type, offline or first_line(error)) from None
    return Repository(name, repo_type, commit.resolved, offline)


def snapshot(repository: Repository, patterns: list[str]) -> Path:
    """Return a folder with a repository's files that match patterns; downloads them when online.

    Raises:
        HubError: The files are not in the local cache and the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repository.name,
                repo_type=repository.repo_type,
                revision=repository.commit,
                allow_patterns=patterns,
                local_files_only=bool(repository.offline),
            )
        )
    except Exception as error:  # noqa: BLE001  the HTTP client's error classes change between versions of the hub's library
        raise _unreachable(repository.name, repository.repo_type, repository.offline or first_line(error)) from None


def _unreachable(name: str, repo_type: RepoType, reason: str) -> HubError:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "ON", "YES"}
    why = "HF_HUB_OFFLINE is set" if offline else f"the hub cannot be reached ({reason})"
    return HubError(
        f"{repo_type} {name!r}: {why}, and the local cache does not hold it",
        action="connect this machine once, or point HF_HOME to a cache filled on another machine"
        + _local_way_out(repo_type),
    )


def _local_way_out(repo_type: RepoType) -> str:
    if repo_type == "dataset":
        return ", or copy the files here and name them under corpus.sources with kind: files"
    return ", or copy the folder here and give its path in place of the name"


def first_line(error: Exception) -> str:
    """Say an error in one short line; some libraries' texts fill a page, others are empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
