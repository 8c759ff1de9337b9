"""Resolve revisions on the Hugging Face hub to commits, and download files at a commit."""

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import responses
from pathlib import Path
from typing import Literal, TypeVar

from inheritune_ds.errors import HubError, InherituneError, StorageError

RepoType = Literal["model", "dataset"]
Answer = TypeVar("Answer")

_TIMEOUT_S = 3.0
"""Fail fast without a network; the hub answers in well under 1 s."""
_BUSY_WAITS_S = (1.0, 2.0)
"""Pauses before retries after HTTP 429 or 5xx; the hub's client does not always retry."""
_SECRET = re.compile(r"\bhf_\w{8,}|(?<=://)[^/@\s]+@|(?<=\?)[^\s'\">)]+")
"""A token, the password of a URL, or its query, which on a CDN is a signature."""


_LOCAL_COPY: dict[RepoType, str] = {
    "model": ", or copy the folder here and give its path instead of the name",
    "dataset": ", or copy the files here and list them under corpus.sources with kind: files",
}


@dataclass(frozen=True)
class Repository:
    """A repository of the hub at one commit."""

    name: str
    """Such as `openlm-research/open_llama_3b`."""
    repo_type: RepoType
    commit: str
    """40 hex digits."""
    offline: str
    """Why the hub did not answer, so that only the local cache is read; "" if it did."""


def resolve(name: str, revision: str, repo_type: RepoType) -> Repository:
    """Find the full commit of a revision (commit, tag or branch) on the hub, or offline in the local cache.

    Raises:
        HubError: No such repository or revision, no access, or neither network nor cache.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi()
    offline = ""
    try:
        _with_retries(lambda: api.repo_info(name, repo_type=repo_type, revision=revision, timeout=_TIMEOUT_S))
    except HFValidationError:
        raise HubError(
            f"{name!r} is neither an existing local folder nor a possible name on the hub",
            allowed="a local folder, or a hub id such as openai-community/gpt2",
            action="correct the name in the recipe",
        ) from None
    except Exception as error:  # noqa: BLE001  the HTTP client's error classes change between versions of the hub's library
        refused = _refusal(error, name, revision, repo_type)
        if refused:
            raise refused from None
        offline = _answer(error) or first_line(error)
    try:
        commit = api.resolve_revision(name, repo_type=repo_type, revision=revision, local_files_only=bool(offline))
    except Exception as error:  # noqa: BLE001  as above
        raise _unreachable(name, repo_type, offline or first_line(error)) from None
    return Repository(name, repo_type, commit.resolved, offline)


def _with_retries(action: Callable[[], Answer]) -> Answer:
    """Retry while the hub is busy, but not without a network."""
    for wait_s in _BUSY_WAITS_S:
        try:
            return action()
        except Exception as error:
            if not any(_status(link) == 429 or _status(link) >= 500 for link in _links(error)):
                raise
            time.sleep(wait_s)
    return action()


def list_files(repository: Repository) -> list[str]:
    """Sorted paths of all files of a repository at its commit; offline from the local cache. Raises as `resolve`."""
    from huggingface_hub import HfApi, get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError
    from huggingface_hub.hf_api import RepoFile

    name, repo_type, commit = repository.name, repository.repo_type, repository.commit
    try:
        return sorted(file.path for file in get_cached_repo_tree(name, repo_type=repo_type, revision=commit))
    except CachedRepoTreeNotFoundError:
        if repository.offline:
            raise _unreachable(name, repo_type, repository.offline) from None
    try:
        listed = HfApi().list_repo_tree(name, recursive=True, repo_type=repo_type, revision=commit)
        return sorted(entry.path for entry in listed if isinstance(entry, RepoFile))
    except Exception as error:  # noqa: BLE001  as in `resolve`
        raise failure(error, repository) from None


def snapshot(repository: Repository, patterns: list[str]) -> Path:
    """Return a folder with the files that match `patterns` (`*` matches slashes, too); download them when online.

    Partial downloads stay in the hub's cache, and the next attempt resumes them.

    Raises:
        HubError: The files are not in the local cache and the hub cannot be reached, or refuses.
        StorageError: The cache cannot be written.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = _with_retries(
            lambda: snapshot_download(
                repository.name,
                repo_type=repository.repo_type,
                revision=repository.commit,
                allow_patterns=patterns,
                local_files_only=bool(repository.offline),
            )
        )
        return Path(folder)
    except Exception as error:  # noqa: BLE001  as in `resolve`
        raise failure(error, repository) from None


def failure(error: BaseException, repository: Repository) -> InherituneError:
    """Translate an exception of `huggingface_hub` or `datasets` while reading a repository."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    name, repo_type = repository.name, repository.repo_type
    refused = _refusal(error, name, repository.commit, repo_type)
    if refused:
        return refused
    links = list(_links(error))
    for link in links:
        if isinstance(link, OSError) and link.errno in {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS}:
            return StorageError(
                f"{repo_type} {name!r}: the hub's cache cannot be written ({first_line(link)})",
                action="free space, or point HF_HOME to a folder with space that this user may write",
            )
    answer = next(filter(None, map(_answer, links)), "")
    if not answer and (repository.offline or isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled)):
        return _unreachable(name, repo_type, repository.offline or first_line(links[-1]))
    said = answer or f"{type(links[-1]).__name__}: {first_line(links[-1])}"
    return HubError(
        f"{repo_type} {name!r} at {repository.commit}: the hub's answers break off ({said})",
        action="rerun the same command to resume; if it fails again, check whether the hub is up"
        + _LOCAL_COPY[repo_type],
    )


def _refusal(error: BaseException, name: str, revision: str, repo_type: RepoType) -> HubError | None:
    """The error for a refusal by the hub; None for any other exception."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    for link in _links(error):
        if isinstance(link, GatedRepoError):
            return HubError(
                f"the hub's {repo_type} {name} is gated: downloads require that its terms were accepted",
                action="accept the terms on its page, then `hf auth login` (or set HF_TOKEN) on this machine"
                + _LOCAL_COPY[repo_type],
            )
        if isinstance(link, RevisionNotFoundError):
            return HubError(
                f"the hub's {repo_type} {name} has no revision {revision!r}",
                allowed="a commit, tag or branch of that repository",
                action="correct revision in the recipe",
            )
        # Without a valid token the hub answers 401 for private and for missing repositories.
        if isinstance(link, RepositoryNotFoundError) or _status(link) in {401, 403}:
            return HubError(
                f"the hub has no {repo_type} {name!r}, or this machine may not see it ({_answer(link)})",
                action="correct the name in the recipe; for a private one give this machine a token that may read it "
                "(`hf auth login`, or set HF_TOKEN), and see that it is valid (`hf auth whoami`)",
            )
    return None


def _links(error: BaseException) -> Iterator[BaseException]:
    """An exception and its causes, the last one first."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _status(error: BaseException) -> int:
    """HTTP status of the hub's answer; 0 without an answer."""
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _answer(error: BaseException) -> str:
    """The hub's answer, such as `HTTP 503 Service Unavailable`; "" without one."""
    status = _status(error)
    return f"HTTP {status} {responses.get(status, '')}".strip() if status else ""


def _unreachable(name: str, repo_type: RepoType, reason: str) -> HubError:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "ON", "YES"}
    why = "HF_HUB_OFFLINE is set" if offline else f"the hub cannot be reached ({reason})"
    return HubError(
        f"{repo_type} {name!r}: {why}, and the local cache does not hold it",
        action="connect this machine once, or point HF_HOME to a cache filled on another machine"
        + _LOCAL_COPY[repo_type],
    )


def first_line(error: BaseException) -> str:
    """An error in one line of at most 160 characters, without secrets; the class name if it has no text."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return _SECRET.sub("...", line)[:160]
