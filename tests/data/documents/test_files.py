import bz2
import gzip
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from inheritune_ds.config.corpus import FilesSource
from inheritune_ds.data.documents import compression, sources
from inheritune_ds.data.documents import files as readers
from inheritune_ds.data.documents.records import Cursor, Document
from inheritune_ds.errors import CorpusError

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": zstandard.compress,
}
FORMATS = [f"{kind}{packing}" for kind in (".txt", ".jsonl", ".json") for packing in PACK] + [".parquet", ".arrow"]


def source(*paths: Path | str, **more: Any) -> FilesSource:
    return FilesSource(kind="files", paths=[str(path) for path in paths], **more)


def read(*paths: Path | str, **more: Any) -> list[Document]:
    return list(sources.documents(source(*paths, **more)))


def write(folder: Path, name: str, texts: Sequence[str | None]) -> Path:
    """Write a file of the format that its name says; documents of plain text end with `<|>`."""
    path = folder / name
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=2)
    elif path.suffix == ".arrow":
        table = pa.table({"text": pa.array(texts, pa.string())})
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    else:
        if ".txt" in path.suffixes:
            content = "".join(f"{text or ''}<|>" for text in texts)
        else:
            content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        packing = path.suffix if path.suffix in compression.SUFFIXES else ""
        path.write_bytes(PACK[packing](content.encode()))
    return path


@pytest.mark.parametrize("ending", FORMATS)
def test_documents_of_every_format(tmp_path: Path, ending: str) -> None:
    texts = ["one\ntwo", "", None, "caf\u00e9 \U0001f600 \0 end", "last"]
    path = write(tmp_path, f"a{ending}", texts)
    reported: list[int] = []
    found = list(sources.documents(source(path, document_separator="<|>"), on_bytes=reported.append))
    assert [document.text for document in found] == [text or "" for text in texts]
    assert [document.skipped for document in found] == ["", "empty", "empty", "", ""]
    assert [document.cursor for document in found] == [Cursor(0, number) for number in range(1, 6)]
    assert sum(reported) == path.stat().st_size


# With characters of the separator, and characters that are special in JSON, UTF-8 and line reading.
TEXTS = st.lists(st.none() | st.text(st.sampled_from("ab \n\r\0<>|\u2028é\U0001f600"), max_size=8), max_size=6)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(FORMATS), TEXTS), min_size=1, max_size=4), st.data())
def test_documents_from_any_cursor_are_the_rest(files: list[tuple[str, list[str | None]]], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = [write(Path(folder), f"{n}{ending}", texts) for n, (ending, texts) in enumerate(files)]
        wanted = source(*paths, document_separator="<|>", filters={"min_characters": 2})
        whole = list(sources.documents(wanted))
        place = data.draw(st.integers(0, len(whole)))
        start = whole[place - 1].cursor if place else Cursor()
        reported: list[int] = []
        assert list(sources.documents(wanted, start, reported.append)) == whole[place:]
        assert sum(reported) == sum(path.stat().st_size for path in paths)
        # Every document is there, in its order; only plain text may have other ones, where a text holds a separator.
        if not any(".txt" in ending for ending, _ in files):
            texts = [text or "" for _, texts in files for text in texts]
            kept = [text if len(text) >= 2 and not text.isspace() else "" for text in texts]
            assert [document.text for document in whole] == kept


def test_documents_from_any_cursor_are_the_rest_with_bad_records_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b'{broken\n\n{"text": "one"}\n{"text": "caf\xe9"}\n{"body": 1}\n{"text": "two"}\n'
    )
    (tmp_path / "b.jsonl").write_bytes(b'[]\n{"text": "three"}\n')
    wanted = source(tmp_path, bad_records="skip")
    whole = list(sources.documents(wanted))
    assert [document.text for document in whole] == ["", "one", "", "", "two", "", "three"]
    assert [document.skipped for document in whole] == ["bad", "", "bad", "bad", "", "bad", ""]
    for place, document in enumerate(whole, 1):
        assert list(sources.documents(wanted, document.cursor)) == whole[place:]


def test_documents_open_no_file_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    taken = compression.open_unpacked

    def note(path: Path, *more: Any) -> Any:
        opened.append(path.name)
        return taken(path, *more)

    monkeypatch.setattr(compression, "open_unpacked", note)
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        write(tmp_path, name, ["one", "two"])
    assert len(list(sources.documents(source(tmp_path), Cursor(1, 1)))) == 3
    assert opened == ["b.jsonl", "c.jsonl"]


@pytest.mark.parametrize("ending", [".txt", ".jsonl.gz", ".parquet", ".arrow"])
def test_documents_refuse_a_start_behind_the_end_of_a_file(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path, f"a{ending}", ["one", "two"])
    with pytest.raises(CorpusError, match=r"(?s)it has 2 records, but 3 were read from it before.*or start over"):
        list(sources.documents(source(path, document_separator="<|>"), Cursor(0, 3)))


@pytest.mark.parametrize("ending", FORMATS)
def test_documents_detect_a_file_that_changes_meanwhile(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path, f"a{ending}", ["one", "two"])
    found = sources.documents(source(path, document_separator="<|>"))
    assert next(found).text == "one"
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(CorpusError, match=r"it was changed while the corpus was read \(it had"):
        list(found)


@pytest.mark.parametrize("ending", FORMATS)
def test_documents_detect_a_file_that_vanishes_meanwhile(tmp_path: Path, ending: str) -> None:
    for name in ("a", "b"):
        write(tmp_path, f"{name}{ending}", ["one", "two"])
    found = sources.documents(source(tmp_path, document_separator="<|>"))
    assert next(found).text == "one"
    (tmp_path / f"b{ending}").unlink()
    with pytest.raises(CorpusError, match=rf"/b{ending}: it cannot be read \(no such file or directory\)"):
        list(found)


def test_documents_report_why_a_file_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.txt", ["x"])

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(compression, "open_unpacked", refuse)
    with pytest.raises(CorpusError, match=r"a\.txt: it cannot be read \(permission denied\)"):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.zst", "a.txt.gz"])
def test_documents_refuse_a_truncated_file_even_if_bad_records_are_skipped(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, [f"text {number}" for number in range(50)])
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(CorpusError, match=r"(?s)it is truncated or damaged.*download it again"):
        read(path, bad_records="skip")


@pytest.mark.parametrize("filters", [{"keep": {"set": ["a"]}}, {"drop": {"set": ["a"]}}])
def test_documents_refuse_filters_on_fields_of_plain_text(tmp_path: Path, filters: dict[str, Any]) -> None:
    write(tmp_path, "a.jsonl", ["one"])
    write(tmp_path, "b.txt.gz", ["one"])
    with pytest.raises(CorpusError, match=r"(?s)b\.txt\.gz: plain text has no fields.*min_characters.*separate source"):
        read(tmp_path, filters=filters)


def test_expand_sorts_matches_and_lists_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.txt", "a.txt", "c.jsonl", "sub/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    found = readers.expand(["c.jsonl", "*.txt", "a.txt", str(tmp_path / "b.txt"), "**/*.txt", "."])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["c.jsonl", "a.txt", "b.txt", "sub/d.txt"]


def test_expand_finds_a_file_named_like_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert readers.expand(["a[1].txt"], tmp_path) == [tmp_path / "a[1].txt"]


def test_expand_lists_a_folder_without_hidden_and_other_files(tmp_path: Path) -> None:
    names = ["README.md", "b.jsonl.gz", "a/2.parquet", "a/10.arrow", ".cache/x.jsonl", "a/.x.txt", "a/LICENSE", "c.zst"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = readers.expand([tmp_path.name + "/"], tmp_path.parent)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a/10.arrow", "a/2.parquet", "b.jsonl.gz"]
    left_out = readers.skipped_files([str(tmp_path), str(tmp_path / "*.gz")])
    assert [path.relative_to(tmp_path).as_posix() for path in left_out] == ["README.md", "a/LICENSE", "c.zst"]


def test_expand_follows_links_to_folders_without_circles(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("x")
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "corpus")
    assert readers.expand(["corpus"], tmp_path) == [tmp_path / "corpus" / "linked" / "a.txt"]


def test_expand_refuses_a_folder_without_corpus_files(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "README.md").write_text("x")
    with pytest.raises(CorpusError, match=r"(?s)'books/' is a folder without a corpus file.*\.arrow"):
        readers.expand(["books/"], tmp_path)


def test_expand_refuses_a_folder_that_it_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "closed").mkdir()
    taken = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return taken(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(CorpusError, match=r"/closed: it cannot be read \(permission denied\)"):
        readers.expand([str(tmp_path)])


@pytest.mark.parametrize("pattern", ["gone.txt", "*.jsonl", "gone/"])
def test_expand_names_the_pattern_and_the_folder(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(CorpusError) as caught:
        readers.expand([pattern], tmp_path)
    assert f"corpus path {pattern!r} matches no file (searched in {tmp_path})" in str(caught.value)
    assert "correct corpus.sources" in str(caught.value)


@pytest.mark.parametrize("name", ["a.csv", "a", "a.gz", "a.parquet.gz", "a.arrow.zst", "a.jsonl.xz"])
def test_expand_lists_the_supported_suffixes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    for pattern in (name, "a*"):
        with pytest.raises(
            CorpusError, match=r"(?s)with this suffix are not supported\n  allowed: \.txt, \.jsonl.*\.bz2.*\.parquet"
        ):
            readers.expand([pattern], tmp_path)
