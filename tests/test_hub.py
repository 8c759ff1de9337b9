import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from inheritune_ds import hub
from inheritune_ds.errors import HubError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def answer(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    def repo_info(*_: object, **__: object) -> SimpleNamespace:
        if error:
            raise error
        return SimpleNamespace(sha=COMMIT)

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)


def refusal(kind: type[errors.HfHubHTTPError]) -> Exception:
    return kind("no", response=SimpleNamespace(headers={}, request=None, status_code=404))  # type: ignore[arg-type]


def fill_cache(cache: Path, kind: str, *, ref: str | None) -> Path:
    repository = cache / f"{kind}s--some--thing"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_text("{}")
    if ref:
        (repository / "refs").mkdir()
        (repository / "refs" / ref).write_text(COMMIT)
    return snapshot


def test_resolve_gives_the_commit_that_the_hub_names(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, None)
    assert hub.resolve("some/thing", "main", "dataset") == hub.Repository("some/thing", "dataset", COMMIT, "")
    # What was learned is kept for a machine without a network.
    answer(monkeypatch, ConnectionError("down"))
    again = hub.resolve("some/thing", "main", "dataset")
    assert (again.commit, again.offline) == (COMMIT, "down")


def test_resolve_takes_a_full_commit_without_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, ConnectionError("down"))
    assert hub.resolve("some/thing", COMMIT, "model").commit == COMMIT


@pytest.mark.parametrize(("kind", "way_out"), [("dataset", "under corpus.sources"), ("model", "give its path")])
def test_resolve_says_at_once_what_to_do_without_network(
    cache: Path, monkeypatch: pytest.MonkeyPatch, kind: hub.RepoType, way_out: str
) -> None:
    """The hub's real client, kept from the network by pytest-socket."""
    started_s = time.monotonic()
    with pytest.raises(HubError) as caught:
        hub.resolve("some/thing", "main", kind)
    assert time.monotonic() - started_s < 5
    message = str(caught.value)
    assert message.startswith(f"{kind} 'some/thing': the hub cannot be reached (")
    assert "and the local cache does not hold it" in message
    assert "HF_HOME" in message
    assert way_out in message


def test_resolve_says_that_the_user_went_offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, errors.OfflineModeIsEnabled("offline"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, and the local cache does not hold it"):
        hub.resolve("some/thing", "main", "model")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (refusal(errors.RepositoryNotFoundError), r"(?s)has no model 'some/thing'.*hf auth login"),
        (refusal(errors.RevisionNotFoundError), "model some/thing has no revision 'v9'"),
        (refusal(errors.GatedRepoError), r"(?s)model some/thing is gated.*accept the terms"),
    ],
)
def test_resolve_explains_a_refusal(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    answer(monkeypatch, error)
    with pytest.raises(HubError, match=message):
        hub.resolve("some/thing", "v9", "model")


def test_resolve_refuses_a_name_that_the_hub_cannot_have() -> None:
    with pytest.raises(HubError, match="'no such folder' is neither an existing local folder nor a possible name"):
        hub.resolve("no such folder", "main", "model")


def test_snapshot_finds_the_cached_files_without_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = fill_cache(cache, "model", ref="main")
    answer(monkeypatch, ConnectionError("down"))
    repository = hub.resolve("some/thing", "main", "model")
    assert hub.snapshot(repository, ["tokenizer.json"]).resolve() == snapshot.resolve()


def test_snapshot_says_what_to_do_when_the_cache_is_empty(cache: Path) -> None:
    repository = hub.Repository("some/thing", "model", COMMIT, "no route to host")
    with pytest.raises(HubError, match=r"(?s)cannot be reached \(no route to host\), and the local cache.*HF_HOME"):
        hub.snapshot(repository, ["tokenizer.json"])
