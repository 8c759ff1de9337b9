import gzip
import json
import random
import string
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from inheritune_ds.corpus import FilesSource
from inheritune_ds.data import readers
from inheritune_ds.errors import CorpusError


def read(*paths: Path | str, **settings: Any) -> list[str | None]:
    return list(readers.documents(FilesSource(kind="files", paths=[str(path) for path in paths], **settings)))


def lines(*texts: str | None) -> bytes:
    return "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts).encode()


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_documents_of_a_text_file_is_the_whole_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffOne\r\n\n\nTwo €\n".encode())
    assert read(path) == ["One\r\n\n\nTwo €\n"]


def test_documents_are_cut_at_the_separator(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one<|end|>two<|end|><|end|>three<|end|>")
    assert read(path, document_separator="<|end|>") == ["one", "two", "", "three"]


def test_documents_are_cut_where_a_separator_spans_two_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    text = "ab--c-d--" * 50 + "end"
    path.write_text(text)
    for size in (1, 2, 3, 7):
        monkeypatch.setattr(readers, "_CHUNK_BYTES", size)
        assert read(path, document_separator="--") == text.split("--")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.jsonl.zst"])
def test_documents_of_json_lines_plain_and_packed(tmp_path: Path, name: str) -> None:
    content = lines("one\ntwo", "", None, "\u2028 line separators \x85 stay") + b"\n  \n" + lines("last").rstrip(b"\n")
    packed = gzip.compress(content) if name.endswith(".gz") else content
    (tmp_path / name).write_bytes(zstandard.compress(content) if name.endswith(".zst") else packed)
    assert read(tmp_path / name) == ["one\ntwo", "", None, "\u2028 line separators \x85 stay", "last"]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
def test_documents_of_packed_text(tmp_path: Path, name: str) -> None:
    pack = gzip.compress if name.endswith(".gz") else zstandard.compress
    (tmp_path / name).write_bytes(pack(b"one--two"))
    assert read(tmp_path / name, document_separator="--") == ["one", "two"]


def test_documents_of_several_zstandard_frames(tmp_path: Path) -> None:
    noise = "".join(random.Random(1).choices(string.printable, k=3_000_000))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines(noise, "two")) + zstandard.compress(lines("three")))
    assert read(tmp_path / "a.jsonl.zst") == [noise, "two", "three"]


def test_documents_of_parquet_come_in_batches(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(3000)] + [None]
    path = write_parquet(tmp_path / "a.parquet", {"n": list(range(3001)), "content": texts})
    assert read(path, text_field="content") == texts


def test_expand_sorts_matches_and_takes_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.txt", "a.txt", "c.jsonl", "sub/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    found = readers.expand(["c.jsonl", "*.txt", "a.txt", str(tmp_path / "b.txt"), "**/*.txt"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["c.jsonl", "a.txt", "b.txt", "sub/d.txt"]


def test_expand_takes_a_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert readers.expand(["a[1].txt"], tmp_path) == [tmp_path / "a[1].txt"]


@pytest.mark.parametrize("pattern", ["gone.txt", "*.jsonl"])
def test_expand_names_the_pattern_and_the_folder(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(CorpusError) as caught:
        readers.expand([pattern], tmp_path)
    assert f"corpus path {pattern!r} matches no file (looked for in {tmp_path})" in str(caught.value)
    assert "correct corpus.sources" in str(caught.value)


def test_expand_says_how_to_take_a_folder(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    with pytest.raises(CorpusError, match=r"(?s)'books/' is a folder.*write books/\*\.jsonl"):
        readers.expand(["books/"], tmp_path)


@pytest.mark.parametrize("name", ["a.csv", "a", "a.gz", "a.parquet.gz", "a.jsonl.bz2"])
def test_expand_lists_the_endings_it_reads(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(CorpusError, match=r"(?s)with this ending is not read\n  allowed: \.txt, \.jsonl.*\.parquet"):
        readers.expand([name], tmp_path)


@pytest.mark.parametrize("bad", ["{broken", "{'text': 'single quotes'}", "[" * 100_000])
def test_documents_name_the_line_of_bad_json(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines("fine") + b"\n" + bad.encode())
    with pytest.raises(CorpusError, match=r"a\.jsonl:3: not a JSON object"):
        read(path)


def test_documents_name_the_fields_present(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines("fine"))
    with pytest.raises(CorpusError, match=r"(?s)a\.jsonl:1: there is no field 'content'.*text, n\n.*set text_field"):
        read(path, text_field="content")
    table = write_parquet(tmp_path / "a.parquet", {"body": ["x"], "n": [1]})
    with pytest.raises(CorpusError, match=r"(?s)a\.parquet: there is no field 'text'.*body, n\n"):
        read(table)


def test_documents_refuse_what_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines("fine"))
    with pytest.raises(CorpusError, match=r"a\.jsonl:1: field 'n' holds int, not text"):
        read(path, text_field="n")
    path.write_text("[1]\n")
    with pytest.raises(CorpusError, match=r"a\.jsonl:1: the record is list, not an object"):
        read(path)
    table = write_parquet(tmp_path / "a.parquet", {"text": [1, 2]})
    with pytest.raises(CorpusError, match=r"a\.parquet: field 'text' holds int64, not text"):
        read(table)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_documents_notice_a_packed_file_that_is_cut_off(tmp_path: Path, name: str) -> None:
    content = lines(*("".join(random.Random(n).choices(string.printable, k=500)) for n in range(50)))
    packed = gzip.compress(content) if name.endswith(".gz") else zstandard.compress(content)
    (tmp_path / name).write_bytes(packed[: len(packed) // 2])
    with pytest.raises(CorpusError, match=r"(?s)it is cut off or damaged.*download it again"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_documents_notice_a_packed_file_that_is_damaged(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"this was never packed, whatever its name says")
    with pytest.raises(CorpusError, match="it is cut off or damaged"):
        read(tmp_path / name)


def test_documents_notice_a_damaged_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(CorpusError, match="it is not a readable parquet file"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_documents_notice_text_that_is_not_utf8(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(CorpusError, match=r"(?s)is not UTF-8 text.*iconv -f LATIN1"):
        read(tmp_path / name)


def test_documents_say_why_a_file_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(readers, "_open", refuse)
    with pytest.raises(CorpusError, match=r"a\.txt: it cannot be read \(permission denied\)"):
        read(path)
