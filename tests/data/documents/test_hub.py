"""Datasets of the hub, read by the real clients in a separate process from a fake hub on the loopback interface."""

import bz2
import gzip
import io
import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from inheritune_ds.config.corpus import FilesSource, HubSource
from inheritune_ds.data.documents import sources
from inheritune_ds.data.documents.records import Cursor
from inheritune_ds.storage import hub
from tests.hub_client import HubClient
from tests.hub_server import SIGNATURE, TOKEN, HubServer

WORDS = random.Random(7).choices(["stone", "river", "of", "and", "light", "seven", "the", "house"], k=4000)


def text(number: int) -> str:
    return f"document {number}: " + " ".join(WORDS[number * 11 % 3000 :][: 5 + number % 40])


def lines(first: int, last: int) -> bytes:
    records = [{"text": text(n), "meta": {"set": "ab"[n % 2], "n": n}} for n in range(first, last)]
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def table(first: int, last: int, rows: int = 20) -> bytes:
    buffer = io.BytesIO()
    values = [text(n) for n in range(first, last)]
    pq.write_table(pa.table({"text": values, "id": list(range(first, last))}), buffer, row_group_size=rows)
    return buffer.getvalue()


def shards() -> dict[str, bytes]:
    """Files in every compression format, in the order of their names; all but the last are on the CDN."""
    return {
        "data/b-3.jsonl.zst": zstandard.compress(lines(90, 250)),
        "data/a-1.jsonl": lines(0, 30),
        "data/b-1.jsonl.gz": gzip.compress(lines(30, 90)),
        "data/c-2.json": lines(310, 312),
        "data/c-1.jsonl.bz2": bz2.compress(lines(250, 310)),
        "README.md": b"# a card that the reader must not take for data\n",
        "more/p.parquet": table(0, 100),
    }


def source(name: str, data_files: str = "data/*.json*", **settings: Any) -> dict[str, Any]:
    return {"kind": "hub", "dataset": name, "data_files": data_files, **settings}


def texts(documents: Any) -> list[str]:
    assert isinstance(documents, list), documents
    return [document[0] for document in documents]


def refusal(answer: Any, exit_code: int) -> str:
    """The message of an error."""
    assert answer["exit_code"] == exit_code
    return str(answer["message"])


STREAMING = pytest.mark.parametrize("streaming", [True, False])
ALL = [text(n) for n in range(312)]


def test_streamed_downloaded_and_local_documents_are_the_same(
    hub_server: HubServer, client: HubClient, tmp_path: Path
) -> None:
    hub_server.publish("datasets", "org/same", shards())
    streamed = client.ask("documents", source=source("org/same"))
    assert texts(streamed) == ALL
    assert client.ask("documents", source=source("org/same", streaming=False)) == streamed
    for name, content in shards().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    local = FilesSource(kind="files", paths=[str(tmp_path / "data")])
    assert [list(document) for document in sources.documents(local)] == [
        [words, skipped, Cursor(*cursor), note] for words, skipped, cursor, note in streamed
    ]
    folder = HubSource.model_validate(source(str(tmp_path)))
    assert texts([list(document) for document in sources.documents(folder)]) == ALL


@STREAMING
def test_documents_begin_again_at_any_cursor(hub_server: HubServer, client: HubClient, *, streaming: bool) -> None:
    files = shards() | {"data/b-2.parquet": table(1000, 1050)}
    hub_server.publish("datasets", "org/again", files)
    wanted = source("org/again", "data/*", streaming=streaming)
    documents = client.ask("documents", source=wanted)
    assert len(documents) == 362
    for number in (28, 29, 89, 109, 139, 360):
        rest = client.ask("documents", source=wanted, start=documents[number][2])
        assert rest == documents[number + 1 :], number


def test_rows_before_the_cursor_are_not_requested(hub_server: HubServer, client: HubClient) -> None:
    noise = random.Random(3)
    rows = [noise.randbytes(2**20).hex() for _ in range(12)]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": rows}), buffer, row_group_size=1, compression="none")
    hub_server.publish("datasets", "org/skip", {"a.jsonl": lines(0, 30), "b.parquet": buffer.getvalue()})
    before = len(hub_server.requests)
    rest = client.ask("documents", source=source("org/skip", "*"), start=(1, 11))
    assert texts(rest) == rows[11:]
    asked = [request for request in hub_server.requests[before:] if request.cdn]
    spans = [re.fullmatch(r"bytes=(\d+)-(\d+)", request.range) for request in asked]
    taken = sum(int(span[2]) - int(span[1]) + 1 for span in spans if span)
    assert len(spans) > 1
    assert taken < 0.6 * len(buffer.getvalue()), "the client reads ahead 5 MiB, at the end and where the rows are"


def test_filters_support_nested_fields_and_bad_records_are_reported(hub_server: HubServer, client: HubClient) -> None:
    bad = b'{"text": 3}\n{"other": "x"}\nno json\n\xff\xfe\n{"text": ""}\n'
    hub_server.publish("datasets", "org/kept", {"x.jsonl": lines(0, 20) + bad})
    wanted = source("org/kept", "x.jsonl", filters={"keep": {"meta.set": ["b"]}}, bad_records="skip")
    found = client.ask("documents", source=wanted)
    assert [document[0] for document in found if not document[1]] == [text(n) for n in range(1, 20, 2)]
    assert [document[1] for document in found[20:]] == ["bad", "bad", "bad", "bad", "filtered"]
    refused = refusal(client.ask("documents", source=source("org/kept", "x.jsonl")), 6)
    assert re.search(r"org/kept@[0-9a-f]{40}/x\.jsonl:21: field 'text' holds int, not text", refused)
    wrong = refusal(client.ask("documents", source=source("org/kept", "x.jsonl", text_field="body")), 6)
    assert re.search(r"x\.jsonl:1: there is no field 'body'\n  allowed: the fields present: text, meta", wrong)


def test_a_line_of_a_text_file_is_a_document(hub_server: HubServer, client: HubClient) -> None:
    hub_server.publish("datasets", "org/plain", {"x.txt": b"one\ntwo\n\nthree"})
    for streaming in (True, False):
        found = client.ask("documents", source=source("org/plain", "x.txt", streaming=streaming))
        assert [document[:2] for document in found] == [["one", ""], ["two", ""], ["", "empty"], ["three", ""]]
    fields = source("org/plain", "x.txt", filters={"keep": {"lang": ["en"]}})
    assert "plain text has no fields" in client.ask("documents", source=fields)["message"]


def test_a_wrong_pattern_ending_or_split_is_refused(hub_server: HubServer, client: HubClient) -> None:
    commit = hub_server.publish("datasets", "org/wrong", shards() | {"x.csv": b"a,b\n", "t.arrow": b"x"})

    def refused(**settings: Any) -> str:
        return refusal(client.ask("documents", source=source("org/wrong", **settings)), 6)

    assert refused(data_files="train/*.parquet") == (
        f"dataset org/wrong at {commit} has no file that matches 'train/*.parquet'\n"
        "  allowed: its files: data/a-1.jsonl, data/b-1.jsonl.gz, data/b-3.jsonl.zst, data/c-1.jsonl.bz2, "
        "data/c-2.json ...\n  do: correct data_files in corpus.sources: a pattern inside the dataset's repository"
    )
    assert f"at {commit}: x.csv: files with this suffix cannot be read\n  allowed: .txt" in refused(data_files="*.csv")
    assert "t.arrow: files with this suffix cannot be streamed" in refused(data_files="*.arrow")
    assert "has no file of the split 'test' among the" in refused(split="test")


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("*.jsonl", ["a.jsonl"]),
        ("**", ["a.jsonl", "x/b.jsonl", "x/y/c.jsonl", "x/y/d[1].jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "x/b.jsonl", "x/y/c.jsonl", "x/y/d[1].jsonl"]),
        ("x/**/[bc].jsonl", ["x/b.jsonl", "x/y/c.jsonl"]),
        ("x/*/?.jsonl", ["x/y/c.jsonl"]),
        ("x/y/[!c]*.jsonl", ["x/y/d[1].jsonl"]),
        (".h*/*", [".hidden/e.jsonl"]),
    ],
)
def test_data_files_is_a_glob_pattern(
    pattern: str, matches: list[str], hub_server: HubServer, client: HubClient
) -> None:
    names = ["a.jsonl", "x/b.jsonl", "x/y/c.jsonl", "x/y/d[1].jsonl", ".hidden/e.jsonl", "x/.f.jsonl"]
    hub_server.publish("datasets", "org/glob", {name: json.dumps({"text": name}).encode() for name in names})
    for streaming in (False, True):
        assert texts(client.ask("documents", source=source("org/glob", pattern, streaming=streaming))) == matches


@STREAMING
@pytest.mark.parametrize("fault", [{"drop_after": 300}, {"drop_after": -1}, {"status": 503}])
def test_one_lost_connection_changes_nothing(
    fault: dict[str, Any], hub_server: HubServer, client: HubClient, *, streaming: bool
) -> None:
    name = f"org/once-{streaming}-{'-'.join(map(str, fault.values()))}".replace("--", "-")
    hub_server.publish("datasets", name, {"data/x.jsonl.gz": gzip.compress(lines(0, 300))})
    with hub_server.fault("GET /lfs/", times=1, **fault) as done:
        assert texts(client.ask("documents", source=source(name, streaming=streaming))) == ALL[:300]
    assert done.hits == 1


def test_an_interrupted_download_is_an_error_and_resumes_the_next_time(
    hub_server: HubServer, client: HubClient, offline_client: HubClient, hub_home: Path
) -> None:
    commit = hub_server.publish("datasets", "org/breaks", {"a.jsonl": lines(0, 30), "b.jsonl": lines(30, 312)})
    whole = source("org/breaks", "*.jsonl", streaming=False)
    large = len(lines(30, 312))
    with (
        hub_server.fault("GET /lfs/", drop_after=5000, times=1),
        hub_server.fault(f"GET /lfs/{_digest(hub_server, large)}", status=403),
    ):
        message = refusal(client.ask("documents", source=whole), 7)
    assert message.startswith("the hub has no dataset 'org/breaks', or this machine may not see it (HTTP 403 ")
    # Half of the files in the cache are not taken for the data set.
    half = refusal(offline_client.ask("documents", source=whole | {"revision": commit}), 7)
    assert "HF_HUB_OFFLINE is set, and the local cache does not hold it" in half
    before = len(hub_server.requests)
    assert texts(client.ask("documents", source=whole)) == ALL
    asked = [request for request in hub_server.requests[before:] if request.cdn]
    assert len(asked) == 1, "the file that had come is not brought again"
    assert not list((hub_home / "hub" / "datasets--org--breaks").rglob("*.incomplete"))


def _digest(server: HubServer, size: int) -> str:
    return next(digest for digest, data in server.large.items() if len(data) == size)


def test_documents_report_the_answer_of_a_broken_hub(hub_server: HubServer, client: HubClient) -> None:
    commit = hub_server.publish("datasets", "org/busy", {"a.jsonl": lines(0, 31)})
    with hub_server.fault("/resolve/.*/a.jsonl", status=503) as fault:
        message = refusal(client.ask("documents", source=source("org/busy", "a.jsonl")), 7)
    assert fault.hits == 6, "asked once and five times more"
    assert message == (
        f"dataset 'org/busy' at {commit}: the hub's answers break off (HTTP 503 Service Unavailable)\n"
        "  do: rerun the same command to resume; if it fails again, check whether the hub is up, "
        "or copy the files here and list them under corpus.sources with kind: files"
    )


def test_a_refusal_is_raised_after_the_documents_before_it(hub_server: HubServer, client: HubClient) -> None:
    hub_server.publish("datasets", "org/midway", {"a.jsonl": lines(0, 30), "b.jsonl": lines(30, 60)})
    with hub_server.fault("/resolve/.*/b.jsonl", status=401):
        answer = client.ask("documents", source=source("org/midway", "*.jsonl"), keep=True, token=TOKEN)
    assert answer["documents"] == 30
    assert answer["message"].startswith(
        "the hub has no dataset 'org/midway', or this machine may not see it (HTTP 401 "
    )
    assert "hf auth login" in answer["message"]
    assert TOKEN not in answer["message"]


def test_a_table_that_the_hub_refuses_is_not_reported_as_damaged(hub_server: HubServer, client: HubClient) -> None:
    commit = hub_server.publish("datasets", "org/table", {"a.parquet": table(0, 60)})
    wanted = source("org/table", "*.parquet")
    with hub_server.fault("GET /lfs/", status=410):
        message = refusal(client.ask("documents", source=wanted), 7)
    assert message.startswith(f"dataset 'org/table' at {commit}: the hub's answers break off (HTTP 410 Gone)")
    with hub_server.fault("GET /lfs/", drop_after=1000, times=1) as fault:
        assert texts(client.ask("documents", source=wanted)) == ALL[:60]
    assert fault.hits == 1


@STREAMING
@pytest.mark.parametrize(
    ("access", "message"),
    [
        ("private", "the hub has no dataset 'org/private', or this machine may not see it (HTTP 401 Unauthorized)\n"),
        ("gated", "the hub's dataset org/gated is gated: downloads require that its terms were accepted\n  do: "),
    ],
)
def test_private_and_gated_datasets_need_a_token(
    access: str, message: str, hub_server: HubServer, client: HubClient, *, streaming: bool
) -> None:
    hub_server.publish("datasets", f"org/{access}", {f"{streaming}.jsonl": lines(0, 30 + streaming)}, access=access)
    wanted = source(f"org/{access}", "*.jsonl", streaming=streaming)
    refused = refusal(client.ask("documents", source=wanted), 7)
    assert refused.startswith(message)
    assert "hf auth login" in refused
    assert SIGNATURE not in refused
    assert texts(client.ask("documents", source=wanted, token=TOKEN)) == ALL[: 30 + streaming]
    assert not any(request.cdn and request.authorized for request in hub_server.requests)


def test_a_branch_that_moves_does_not_change_a_pinned_run(
    hub_server: HubServer, client: HubClient, tmp_path: Path
) -> None:
    old = hub_server.publish("datasets", "org/moves", {"a.jsonl": lines(0, 30)}, "main", "v1")
    wanted = source("org/moves", "a.jsonl")
    identity = client.ask("identify", source=wanted)
    assert identity == {
        "kind": "hub",
        "dataset": "org/moves",
        "commit": old,
        "data_files": "a.jsonl",
        "split": None,
        "text_field": "text",
    }
    assert client.ask("pin", folder=str(tmp_path), repo_type="dataset", name="org/moves") == old
    new = hub_server.publish("datasets", "org/moves", {"a.jsonl": lines(30, 90)})
    assert client.ask("pin", folder=str(tmp_path), repo_type="dataset", name="org/moves") == old
    assert client.ask("identify", source=wanted)["commit"] == new
    assert texts(client.ask("documents", source=wanted)) == ALL[30:90]
    for revision in (old, "v1"):
        for streaming in (True, False):
            pinned = wanted | {"revision": revision, "streaming": streaming}
            assert texts(client.ask("documents", source=pinned)) == ALL[:30]
            assert client.ask("identify", source=pinned) == identity


def test_without_a_network_the_cache_has_the_same_documents(
    hub_server: HubServer, client: HubClient, offline_client: HubClient
) -> None:
    hub_server.publish("datasets", "org/cached", shards())
    downloaded = client.ask("documents", source=source("org/cached", streaming=False))
    identity = client.ask("identify", source=source("org/cached"))
    before = len(hub_server.requests)
    for streaming in (True, False):
        wanted = source("org/cached", streaming=streaming)
        assert offline_client.ask("documents", source=wanted) == downloaded
        assert offline_client.ask("documents", source=wanted, start=downloaded[99][2]) == downloaded[100:]
        assert offline_client.ask("identify", source=wanted) == identity
    assert len(hub_server.requests) == before
    hub_server.stop()
    try:
        assert client.ask("documents", source=source("org/cached")) == downloaded
        assert client.ask("identify", source=source("org/cached")) == identity
    finally:
        hub_server.start()
    # Of the rest of the repository nothing was downloaded.
    assert refusal(offline_client.ask("documents", source=source("org/cached", "more/*.parquet")), 7) == (
        "dataset 'org/cached': HF_HUB_OFFLINE is set, and the local cache does not hold it\n"
        "  do: connect this machine once, or point HF_HOME to a cache filled on another machine, "
        "or copy the files here and list them under corpus.sources with kind: files"
    )


def test_documents_detect_a_truncated_file_on_the_hub(hub_server: HubServer, client: HubClient) -> None:
    """`datasets` itself takes the Zstandard file for one without records."""
    whole = zstandard.compress(lines(0, 312))
    hub_server.publish("datasets", "org/cut", {"x.jsonl.zst": whole[: len(whole) // 2]})
    for streaming in (True, False):
        message = refusal(client.ask("documents", source=source("org/cut", "*.zst", streaming=streaming)), 6)
        assert "x.jsonl.zst: it is truncated or damaged (its end is missing)" in message


def test_a_full_disk_is_reported_as_a_storage_error() -> None:
    error = RuntimeError("download failed")
    error.__cause__ = OSError(28, "No space left on device")
    problem = hub.failure(error, hub.Repository("org/set", "dataset", "0" * 40, ""))
    assert problem.exit_code == 5
    assert (
        problem.problem == "dataset 'org/set': the hub's cache cannot be written ([Errno 28] No space left on device)"
    )
