import io
import json
import tracemalloc
from pathlib import Path
from typing import Any, cast

import pytest

from inheritune_ds.config.corpus import Filters
from inheritune_ds.data.documents import compression
from inheritune_ds.data.documents import text as text_files
from inheritune_ds.data.documents.records import Cursor, Document, RecordRules
from inheritune_ds.errors import CorpusError

LINES = Path("a.jsonl")
PLAIN = Path("a.txt")
START = Cursor()


def rules(*, skip_bad: bool = False, **filters: Any) -> RecordRules:
    return RecordRules("text", Filters(**filters), skip_bad)


def stream_of(content: bytes) -> io.BufferedReader:
    return compression.open_unpacked(PLAIN, lambda _: None, cast("io.RawIOBase", io.BytesIO(content)))


def json_lines(content: bytes, asked: RecordRules | None = None, start: Cursor = START) -> list[Document]:
    return list(text_files.json_lines(stream_of(content), LINES, asked or rules(), start))


def plain(content: bytes, separator: str | None = None, path: Path = PLAIN) -> list[str]:
    found = text_files.plain_text(stream_of(content), path, rules(), separator, Cursor())
    return [document.text for document in found]


def line(text: str | None, **fields: Any) -> bytes:
    return json.dumps({"text": text, **fields}).encode() + b"\n"


def test_json_lines_yield_a_document_per_record_and_none_for_blank_lines() -> None:
    content = line("one\ntwo") + b"\n \r\n" + line("") + line(None) + line(" \n\t") + line("last").rstrip(b"\n")
    assert json_lines(content, start=Cursor(7, 0)) == [
        Document("one\ntwo", "", Cursor(7, 1)),
        Document("", "empty", Cursor(7, 2)),
        Document("", "empty", Cursor(7, 3)),
        Document("", "empty", Cursor(7, 4)),
        Document("last", "", Cursor(7, 5)),
    ]


def test_json_lines_end_at_a_newline_only_and_keep_nul_in_a_text() -> None:
    texts = ["\u2028 line separators \x85 stay", "a\0b", "\rc"]
    content = b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts)
    assert [document.text for document in json_lines(content)] == texts


def test_json_lines_skip_a_byte_order_mark() -> None:
    assert json_lines(b"\xef\xbb\xbf" + line("one")) == [Document("one", "", Cursor(0, 1))]
    assert json_lines(b"\xef\xbb\xbf") == []


def test_json_lines_replace_half_a_surrogate_pair() -> None:
    (document,) = json_lines(b'{"text": "a\\ud83d b \\ud83d\\ude00"}\n')
    assert document.text == "a\ufffd b \U0001f600"


def test_json_lines_are_not_parsed_before_the_start() -> None:
    content = b"{broken\n\n" + line("two") + line("three")
    assert json_lines(content, start=Cursor(0, 1)) == [
        Document("two", "", Cursor(0, 2)),
        Document("three", "", Cursor(0, 3)),
    ]


def test_json_lines_skip_filtered_records() -> None:
    content = (
        line("books", meta={"set": "Book"}, stars=5)
        + line("code", meta={"set": "Github"}, stars=5)
        + line("dull", meta={"set": "Book"}, stars=0)
        + line("nothing known")
        + line("so-so!", meta={"set": "Book"}, stars=None)
    )
    asked = rules(keep={"meta.set": ["Book", "ArXiv"]}, drop={"stars": [0, 1]}, max_characters=5)
    assert [(document.text, document.skipped) for document in json_lines(content, asked)] == [
        ("books", ""),
        ("", "filtered"),
        ("", "filtered"),
        ("", "filtered"),
        ("", "filtered"),
    ]


BAD = {
    "broken": (b"{broken\n", r"a\.jsonl:3: not a JSON object"),
    "quotes": (b"{'text': 'single quotes'}\n", r"a\.jsonl:3: not a JSON object"),
    "deep": (b"[" * 100_000 + b"\n", r"a\.jsonl:3: not a JSON object"),
    "zeros": (b"\0\0\0\0\n", r"a\.jsonl:3: not a JSON object"),
    "list": (b"[1]\n", r"(?s)a\.jsonl:3: the record is list, not an object.*set bad_records of this source to skip"),
    "field": (b'{"body": "x", "n": 1}\n', r"(?s)a\.jsonl:3: there is no field 'text'.*body, n\n.*set text_field"),
    "number": (b'{"text": 5}\n', r"a\.jsonl:3: field 'text' holds int, not text"),
    "latin1": (b'{"text": "caf\xe9"}\n', r"(?s)a\.jsonl:3: it is not UTF-8 text \(.* at byte 13 of the line\).*iconv"),
}


@pytest.mark.parametrize("kind", BAD)
def test_json_lines_refuse_or_skip_a_bad_record(kind: str) -> None:
    content, message = BAD[kind]
    content = line("one") + b"\n" + content + line("two")
    with pytest.raises(CorpusError, match=message):
        json_lines(content)
    one, bad, two = json_lines(content, rules(skip_bad=True))
    assert (one.text, two.text) == ("one", "two")
    assert (bad.text, bad.skipped, bad.cursor) == ("", "bad", Cursor(0, 2))
    assert bad.note.startswith("a.jsonl:3: ")


def test_json_lines_refuse_or_skip_a_line_above_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = line("x" * 1000)
    monkeypatch.setattr(text_files, "MAX_DOCUMENT_BYTES", len(fits) - 1)
    content = line("one") + fits + line("x" * 1001) + line("two") + line("x" * 5000).rstrip(b"\n")
    with pytest.raises(CorpusError, match=r"(?s)a\.jsonl:3: the line is longer than .*1,012 bytes.*several records"):
        json_lines(content)
    found = json_lines(content, rules(skip_bad=True))
    assert [(len(document.text), document.skipped) for document in found] == [
        (3, ""),
        (1000, ""),
        (0, "bad"),
        (3, ""),
        (0, "bad"),
    ]
    assert found[-1].note.startswith("a.jsonl:5: the line is longer")


def test_json_lines_never_hold_a_line_above_the_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(text_files, "MAX_DOCUMENT_BYTES", 2**20)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\0" * 2**26 + b"\n" + line("two"))
    tracemalloc.start()
    with path.open("rb") as stream:
        found = list(text_files.json_lines(stream, path, rules(skip_bad=True), Cursor()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [document.text for document in found] == ["", "two"]
    assert peak < 2**23


def test_plain_text_is_one_document_without_a_separator() -> None:
    assert plain("\ufeffOne\r\n\n\0\nTwo €\n".encode()) == ["One\r\n\n\0\nTwo €\n"]
    assert plain(b"") == [""]


def test_plain_text_is_cut_at_the_separator() -> None:
    text = "one<|end|>two<|end|><|end|>three<|end|>"
    assert plain(text.encode(), "<|end|>") == ["one", "two", "", "three"]
    assert plain(b"", "<|end|>") == []
    assert plain("\ufeff".encode(), "--") == []


@pytest.mark.parametrize("separator", ["--", "-", "aaa", "aa", "é€", "\n\n"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 2**20])
def test_plain_text_is_split_like_the_whole_text(monkeypatch: pytest.MonkeyPatch, separator: str, size: int) -> None:
    monkeypatch.setattr(text_files, "_CHUNK_BYTES", size)
    text = "ab--c-d-- aaaaa é€é\n\n\n aaa---" * 10 + "end"
    assert plain(text.encode(), separator) == text.split(separator)


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b"a" * 3_000_000])
@pytest.mark.parametrize("separator", [None, "--", "-"])
def test_plain_text_reports_the_byte_that_is_not_utf8(before: bytes, separator: str | None) -> None:
    place = f"{len(before) + 5:,}"
    with pytest.raises(
        CorpusError, match=rf"(?s)a\.txt: it is not UTF-8 text \(.* at byte {place}\).*iconv -f ENCODING"
    ):
        plain(before + b"--caf\xe9 and more", separator)
    with pytest.raises(CorpusError, match=rf"a\.txt\.gz: .* at byte {place} after decompression"):
        plain(before + b"--caf\xe9 and more", separator, Path("a.txt.gz"))


def test_plain_text_above_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_DOCUMENT_BYTES", 10)
    assert plain(b"0123456789") == ["0123456789"]
    assert plain(b"0123456789--0123456789", "--") == ["0123456789", "0123456789"]
    with pytest.raises(CorpusError, match=r"(?s)a\.txt: the text is longer than .*10 bytes\n.*set document_separator"):
        plain(b"0123456789-")
    for content in (b"01--0123456789x", b"01--0123456789x--", b"01--" + b"x" * 100):
        with pytest.raises(CorpusError, match=r"a\.txt: the document that begins at byte 4 is longer than"):
            plain(content, "--")
