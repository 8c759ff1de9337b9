"""Names of the hub: the real clients against a fake hub on the loopback interface, and without a network."""

import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from inheritune_ds.errors import HubError
from inheritune_ds.storage import hub
from tests.hub_client import HubClient
from tests.hub_server import SIGNATURE, TOKEN, HubServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKENIZER = b'{"model": {}}' + b" " * 3000
SMALL = {"config.json": b'{"a": 1}', "tokenizer.json": TOKENIZER, "model.safetensors": b"weights" * 9000}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_resolve_accepts_branches_tags_and_commits(hub_server: HubServer, client: HubClient) -> None:
    first = hub_server.publish("models", "org/refs", SMALL, "main", "v1")
    second = hub_server.publish("models", "org/refs", SMALL | {"more.json": b"{}"}, "main")
    assert client.ask("resolve", name="org/refs") == [second, ""]
    assert client.ask("resolve", name="org/refs", revision="v1") == [first, ""]
    assert client.ask("resolve", name="org/refs", revision=first) == [first, ""]


def test_resolve_accepts_a_full_commit_offline(cache: Path) -> None:
    found = hub.resolve("some/thing", COMMIT, "model")
    assert found.commit == COMMIT
    assert found.offline


@pytest.mark.parametrize(("kind", "way_out"), [("dataset", "under corpus.sources"), ("model", "give its path")])
def test_resolve_fails_fast_without_a_network(cache: Path, kind: hub.RepoType, way_out: str) -> None:
    """The hub's real client, kept from the network by pytest-socket."""
    started_s = time.monotonic()
    with pytest.raises(HubError) as caught:
        hub.resolve("some/thing", "main", kind)
    assert time.monotonic() - started_s < 5
    assert caught.value.exit_code == 7
    message = str(caught.value)
    assert message.startswith(f"{kind} 'some/thing': the hub cannot be reached (")
    assert "and the local cache does not hold it" in message
    assert "HF_HOME" in message
    assert way_out in message


def test_resolve_times_out_after_three_seconds(hub_server: HubServer, client: HubClient) -> None:
    hub_server.publish("models", "org/slow", SMALL)
    started_s = time.monotonic()
    with hub_server.fault("/api/models/org/slow", delay_s=6):
        answer = client.ask("resolve", name="org/slow")
    assert time.monotonic() - started_s < 4.5
    assert answer["exit_code"] == 7
    assert answer["message"].startswith("model 'org/slow': the hub cannot be reached (")


def test_resolve_reports_the_offline_variable(offline_client: HubClient) -> None:
    answer = offline_client.ask("resolve", name="some/thing")
    assert answer["exit_code"] == 7
    assert "HF_HUB_OFFLINE is set, and the local cache does not hold it" in answer["message"]


def test_resolve_explains_a_refusal(hub_server: HubServer, client: HubClient) -> None:
    hub_server.publish("models", "org/seen", SMALL)
    hub_server.publish("models", "org/hidden", SMALL, access="private")
    assert client.ask("resolve", name="org/seen", revision="v9")["message"] == (
        "the hub's model org/seen has no revision 'v9'\n"
        "  allowed: a commit, tag or branch of that repository\n  do: correct revision in the recipe"
    )
    for name, token, answer in (("org/none", "", 401), ("org/none", TOKEN, 404), ("org/hidden", "", 401)):
        message = client.ask("resolve", name=name, token=token)["message"]
        assert message.startswith(f"the hub has no model '{name}', or this machine may not see it (HTTP {answer} ")
        assert "`hf auth login`" in message
    assert client.ask("resolve", name="org/hidden", token=TOKEN)[1] == ""


def test_resolve_refuses_a_name_that_the_hub_cannot_have() -> None:
    with pytest.raises(HubError, match="'no such folder' is neither an existing local folder nor a possible name"):
        hub.resolve("no such folder", "main", "model")


def test_resolve_retries_a_busy_hub(hub_server: HubServer, client: HubClient) -> None:
    commit = hub_server.publish("models", "org/busy", SMALL)
    with hub_server.fault("/api/models/org/busy/", status=503, times=1) as fault:
        assert client.ask("resolve", name="org/busy") == [commit, ""]
    assert fault.hits == 1


def test_a_busy_hub_is_reported_or_the_cache_is_used(hub_server: HubServer, client: HubClient) -> None:
    commit = hub_server.publish("models", "org/busier", SMALL)
    with hub_server.fault("/api/models/org/busier/", status=503) as fault:
        answer = client.ask("resolve", name="org/busier")
        assert fault.hits == 3
        assert answer["message"].startswith(
            "model 'org/busier': the hub cannot be reached (HTTP 503 Service Unavailable), and the local cache does not"
        )
    files = client.ask("snapshot", name="org/busier", patterns=["*.json"])
    with hub_server.fault("/api/models/org/busier/", status=502):
        assert client.ask("resolve", name="org/busier") == [commit, "HTTP 502 Bad Gateway"]
        assert client.ask("snapshot", name="org/busier", patterns=["*.json"], revision=commit) == files


def test_snapshot_downloads_files_once(hub_server: HubServer, client: HubClient, offline_client: HubClient) -> None:
    hub_server.publish("models", "org/files", SMALL)
    small = {name: SMALL[name].decode() for name in ("config.json", "tokenizer.json")}
    assert client.ask("snapshot", name="org/files", patterns=["*.json"]) == small
    before = len(hub_server.asked("resolve|lfs"))
    assert client.ask("snapshot", name="org/files", patterns=["*.json"]) == small
    assert offline_client.ask("snapshot", name="org/files", patterns=["*.json"]) == small
    assert len(hub_server.asked("resolve|lfs")) == before
    missing = offline_client.ask("snapshot", name="org/files", patterns=["*.safetensors"])
    assert missing["message"] == (
        "model 'org/files': HF_HUB_OFFLINE is set, and the local cache does not hold it\n"
        "  do: connect this machine once, or point HF_HOME to a cache filled on another machine, "
        "or copy the folder here and give its path instead of the name"
    )


def test_snapshot_resumes_a_broken_download(hub_server: HubServer, client: HubClient) -> None:
    """The client keeps finished chunks of 10 MiB."""
    content = b"0123456789abcdef" * (11 * 2**16)
    hub_server.publish("models", "org/broken", {"model.safetensors": content})
    with hub_server.fault("GET /lfs/", drop_after=len(content) - 1000, times=1) as fault:
        files = client.ask("snapshot", name="org/broken", patterns=["*.safetensors"])
    assert files == {"model.safetensors": content.decode()}
    assert fault.hits == 1
    assert [request.range for request in hub_server.asked("GET /lfs/")][-2:] == ["", f"bytes={10 * 2**20}-"]


def test_a_failed_download_is_reported_without_its_signature(hub_server: HubServer, client: HubClient) -> None:
    commit = hub_server.publish("models", "org/never", {"model.safetensors": b"never seen" * 9000})
    with hub_server.fault("GET /lfs/", status=500):
        answer = client.ask("snapshot", name="org/never", patterns=["*"])
    assert answer["exit_code"] == 7
    assert answer["message"].startswith(
        f"model 'org/never' at {commit}: the hub's answers break off (HTTP 500 Internal Server Error)\n  do: rerun "
    )
    assert SIGNATURE not in answer["message"]


def test_a_tokenizer_of_the_hub_is_cached(
    hub_server: HubServer, client: HubClient, offline_client: HubClient, tmp_path: Path
) -> None:
    from tests.surgery import tiny

    tiny.make_tokenizer(40).save_pretrained(tmp_path)
    hub_server.publish("models", "org/words", tmp_path)
    assert offline_client.ask("tokens", name="org/words", text="w3 w5")["exit_code"] == 7
    ids = client.ask("tokens", name="org/words", text="w3 w5")
    assert ids
    hub_server.stop()
    try:
        assert client.ask("tokens", name="org/words", text="w3 w5") == ids
    finally:
        hub_server.start()


def test_first_line_has_no_secrets() -> None:
    error = RuntimeError(f"GET https://me:pass@cdn.example/lfs/x?Signature=abc&Key=1 with {TOKEN} failed\nmore")
    assert hub.first_line(error) == "GET https://...cdn.example/lfs/x?... with ... failed"
    assert hub.first_line(ConnectionError()) == "ConnectionError"
