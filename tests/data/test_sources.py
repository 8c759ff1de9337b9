import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from inheritune_ds import hub
from inheritune_ds.corpus import EmbeddedSource, FilesSource, HubSource
from inheritune_ds.data import embedded, sources
from inheritune_ds.errors import CorpusError, HubError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for name, texts in (("b", ["three"]), ("a", ["one", "", "two"])):
        content = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts)
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(content.encode(), mtime=0))
    return folder.parent


def hub_source(dataset: Path | str, **settings: Any) -> HubSource:
    return HubSource(**{"kind": "hub", "dataset": str(dataset), "data_files": "data/*.jsonl.gz", **settings})


def test_documents_of_embedded_are_the_embedded_ones() -> None:
    assert list(sources.documents(EmbeddedSource(kind="embedded"))) == list(embedded.documents())
    assert sources.identify(EmbeddedSource(kind="embedded")) == embedded.identity()


def test_documents_without_text_come_as_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": " \\n\\t"}\n{"text": null}\n{"text": ""}\n{"text": " two "}\n')
    assert list(sources.documents(FilesSource(kind="files", paths=[str(path)]))) == ["one", "", "", "", " two "]


def test_documents_replace_half_a_surrogate_pair(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud83d b \\ud83d\\ude00"}\n')
    (text,) = sources.documents(FilesSource(kind="files", paths=[str(path)]))
    assert text == "a\ufffd b \U0001f600"


def test_identify_files_by_size_and_hash_and_not_by_place(tmp_path: Path) -> None:
    content = b"some text"
    identities = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.txt").write_bytes(content)
        source = FilesSource(kind="files", paths=[str(tmp_path / place / "*.txt")], document_separator="--")
        identities.append(sources.identify(source))
    assert identities[0] == identities[1]
    assert identities[0] == {
        "kind": "files",
        "text_field": "text",
        "document_separator": "--",
        "files": [{"name": "a.txt", "size": 9, "sha256": hashlib.sha256(content).hexdigest()}],
    }


def test_identify_names_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")

    def refuse(path: Path, _: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(sources, "sha256_file", refuse)
    with pytest.raises(CorpusError, match=r"corpus file .*a\.txt: it cannot be read \(permission denied\)"):
        sources.identify(FilesSource(kind="files", paths=[str(path)]))


def test_documents_of_a_local_dataset_are_streamed_in_order(dataset: Path) -> None:
    assert list(sources.documents(hub_source(dataset))) == ["one", "", "two", "three"]


def test_identify_a_local_dataset_by_its_files(dataset: Path) -> None:
    identity = sources.identify(hub_source(dataset))
    assert [file["name"] for file in identity["files"]] == ["a.jsonl.gz", "b.jsonl.gz"]
    assert "commit" not in identity
    assert identity["split"] == "train"


def test_documents_of_a_local_dataset_name_what_is_wrong(dataset: Path) -> None:
    with pytest.raises(CorpusError, match=r"(?s)record 0: there is no field 'body'.*text, n"):
        list(sources.documents(hub_source(dataset, text_field="body")))
    with pytest.raises(CorpusError, match=r"corpus path 'data/\*\.parquet' matches no file \(looked for in .*set\)"):
        list(sources.documents(hub_source(dataset, data_files="data/*.parquet")))
    with pytest.raises(CorpusError, match=r"(?s)split.*test.*correct split or data_files"):
        list(sources.documents(hub_source(dataset, split="test")))
    with pytest.raises(CorpusError, match="is written as a path, and there is no such folder"):
        list(sources.documents(hub_source(dataset / "gone")))


def test_identify_a_hub_dataset_by_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "resolve", lambda name, _revision, kind: hub.Repository(name, kind, COMMIT, ""))
    assert sources.identify(hub_source("some/set")) == {
        "kind": "hub",
        "dataset": "some/set",
        "commit": COMMIT,
        "data_files": "data/*.jsonl.gz",
        "split": "train",
        "text_field": "text",
    }


def test_documents_of_a_hub_dataset_ask_for_the_commit_and_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: dict[str, Any] = {}

    def load(name: str, **settings: Any) -> list[dict[str, str]]:
        asked.update(settings, name=name)
        return [{"text": "one"}]

    monkeypatch.setattr(hub, "resolve", lambda name, _revision, kind: hub.Repository(name, kind, COMMIT, ""))
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(sources.documents(hub_source("some/set"))) == ["one"]
    assert asked == {
        "name": "some/set",
        "data_files": "data/*.jsonl.gz",
        "revision": COMMIT,
        "split": "train",
        "streaming": True,
    }


def test_documents_of_a_hub_dataset_without_network_come_from_the_cache(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "resolve", lambda name, _revision, kind: hub.Repository(name, kind, COMMIT, "no network"))
    monkeypatch.setattr(hub, "snapshot", lambda _repository, _patterns: dataset)
    assert list(sources.documents(hub_source("some/set"))) == ["one", "", "two", "three"]


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (FileNotFoundError("x"), CorpusError, r"has no file that matches 'data/\*\.jsonl\.gz'"),
        (ValueError("Bad split: x"), CorpusError, r"(?s)Bad split: x.*correct split"),
        (RuntimeError("connection lost"), HubError, r"(?s)reading failed \(RuntimeError: connection lost\).*again"),
        (ConnectionError(), HubError, r"reading failed \(ConnectionError: ConnectionError\)"),
    ],
)
def test_documents_of_a_hub_dataset_explain_what_the_library_raises(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: type[Exception], message: str
) -> None:
    import datasets

    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(hub, "resolve", lambda name, _revision, kind: hub.Repository(name, kind, COMMIT, ""))
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(expected, match=message):
        list(sources.documents(hub_source("some/set")))
