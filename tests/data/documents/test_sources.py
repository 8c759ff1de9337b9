import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from inheritune_ds.config.corpus import EmbeddedSource, FilesSource, HubSource, TokensSource
from inheritune_ds.data.documents import python_docs, sources
from inheritune_ds.errors import CorpusError
from inheritune_ds.storage import hub


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for name, texts in (("b", ["three"]), ("a", ["one", "", "two"])):
        content = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts)
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(content.encode(), mtime=0))
    return folder.parent


def hub_source(dataset: Path | str, **settings: Any) -> HubSource:
    return HubSource(**{"kind": "hub", "dataset": str(dataset), "data_files": "data/*.jsonl.gz", **settings})


def test_documents_of_embedded_are_the_embedded_ones() -> None:
    source = EmbeddedSource(kind="embedded")
    found = list(sources.documents(source))
    assert tuple(document.text for document in found) == python_docs.running().documents
    assert list(sources.documents(source, found[9].cursor)) == found[10:]
    assert sources.identify(source) == python_docs.identity()
    assert (sources.total_bytes(source), sources.snapshot(source), sources.skipped_files(source)) == (None, (), [])


def test_check_detects_a_new_file(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("text")
    source = FilesSource(kind="files", paths=[str(tmp_path)])
    before = sources.snapshot(source)
    (tmp_path / "README").write_text("no corpus file")
    sources.check(source, before)
    (tmp_path / "a.txt").write_text("other text")
    with pytest.raises(CorpusError, match=r"(?s)a\.txt: it appeared while the corpus was read.*let its writer finish"):
        sources.check(source, before)


def test_a_branch_is_pinned_to_its_commit_and_nothing_else_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = iter(["a" * 40, "b" * 40])

    def resolve(name: str, revision: str, repo_type: hub.RepoType) -> hub.Repository:
        assert (name, revision) == ("org/name", "main")
        return hub.Repository(name, repo_type, next(commits), "")

    monkeypatch.setattr(hub, "resolve", resolve)
    source = HubSource(kind="hub", dataset="org/name", data_files="*.jsonl", weight=2.0)
    pinned = sources.pinned(source)
    assert pinned == source.model_copy(update={"revision": "a" * 40})
    assert sources.pinned(pinned) is pinned
    for other in (
        source.model_copy(update={"dataset": str(tmp_path)}),
        FilesSource(kind="files", paths=["a"]),
        EmbeddedSource(kind="embedded"),
    ):
        assert sources.pinned(other) is other


def test_identify_nanogpt_files_by_size_and_hash(tmp_path: Path) -> None:
    files = []
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes(name.encode())
        files.append({"name": name, "size": len(name), "sha256": hashlib.sha256(name.encode()).hexdigest()})
    source = TokensSource(kind="nanogpt", train=str(tmp_path / "train.bin"), validation=str(tmp_path / "val.bin"))
    assert sources.identify(source) == {"kind": "nanogpt", "files": files}
    alone = TokensSource(kind="nanogpt", train=str(tmp_path / "train.bin"))
    assert sources.identify(alone) == {"kind": "nanogpt", "files": files[:1]}
    gone = TokensSource(kind="nanogpt", train=str(tmp_path / "gone.bin"))
    with pytest.raises(CorpusError, match=r"gone\.bin: it cannot be read \(no such file"):
        sources.identify(gone)


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


def test_documents_of_a_local_dataset_are_in_order(dataset: Path) -> None:
    source = hub_source(dataset)
    found = list(sources.documents(source))
    assert [document.text for document in found] == ["one", "", "two", "three"]
    for place, document in enumerate(found, 1):
        assert list(sources.documents(source, document.cursor)) == found[place:]
    assert sources.total_bytes(source) == sum(path.stat().st_size for path in dataset.glob("data/*"))


def test_identify_a_local_dataset_by_its_files(dataset: Path) -> None:
    identity = sources.identify(hub_source(dataset))
    assert [file["name"] for file in identity["files"]] == ["a.jsonl.gz", "b.jsonl.gz"]
    assert "commit" not in identity
    assert identity["split"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_field": "body"}, r"(?s)there is no field 'body'.*text, n"),
        ({"data_files": "data/*.parquet"}, r"corpus path 'data/\*\.parquet' matches no file \(searched in .*set\)"),
        ({"split": "test"}, r"(?s)split.*test.*data_files"),
        ({"dataset": "./gone"}, "is a path, but the folder does not exist"),
    ],
)
def test_documents_of_a_local_dataset_name_the_problem(dataset: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        list(sources.documents(hub_source(**{"dataset": dataset, **settings})))
