"""Reads records of text files: JSON lines, and plain text split at a separator.

A record is at most `MAX_DOCUMENT_BYTES` long; up to three copies are in memory (bytes, line, text).
"""

import io
import json
from collections.abc import Generator, Iterator
from pathlib import Path

from inheritune_ds.data.documents.records import Cursor, Document, RecordRules
from inheritune_ds.errors import CorpusError
from inheritune_ds.storage.file_kind import BYTE_ORDER_MARK

MAX_DOCUMENT_BYTES = 128 * 2**20
"""Longest document, and longest line of JSON (UTF-8 bytes): about 130 books."""

_CHUNK_BYTES = 2**20
_SKIP = "set bad_records of this source to skip"


def json_lines(
    stream: io.BufferedReader, path: Path, rules: RecordRules, start: Cursor
) -> Generator[Document, None, int]:
    """Yield the records of a decompressed file with one JSON object per line; returns how many it has.

    Blank lines are skipped; the lines of the first `start.record` records are not parsed.

    Raises:
        CorpusError: The file is damaged, or has a bad record and these are refused.
    """
    records = 0
    for number, line in enumerate(_lines(stream), 1):
        if line is not None and (not line or line.isspace()):
            continue
        records += 1
        if records > start.record:
            yield _json_document(line, f"{path}:{number}", rules, Cursor(start.file, records))
    return records


def _lines(stream: io.BufferedReader) -> Iterator[bytes | None]:
    """Yield lines; None replaces one that is too long."""
    first = True
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        if first:
            first = False
            line = line.removeprefix(BYTE_ORDER_MARK)
        if len(line) > MAX_DOCUMENT_BYTES and not line.endswith(b"\n"):
            del line
            while (rest := stream.readline(_CHUNK_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield None
        else:
            yield line


def _json_document(line: bytes | None, where: str, rules: RecordRules, cursor: Cursor) -> Document:
    if line is None:
        return rules.bad(too_long(f"{where}: the line", "cut the document in it into several records"), cursor)
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        problem = not_utf8(where, error, f"byte {error.start} of the line", f"{_encoding(error.object)}, or {_SKIP}")
        return rules.bad(problem, cursor)
    except (ValueError, RecursionError) as error:
        problem = CorpusError(
            f"{where}: not a JSON object ({error})",
            allowed="one complete JSON object per line",
            action="correct or remove that line, or set bad_records of this source to skip",
        )
        return rules.bad(problem, cursor)
    return rules.document(record, where, cursor)


def plain_text(
    stream: io.BufferedReader, path: Path, rules: RecordRules, separator: str | None, start: Cursor
) -> Generator[Document, None, int]:
    """Yield the documents of a plain text, the whole file or the pieces between separators; returns how many it has.

    A separator at the end of the file begins no document. Bytes that are not text are always refused, because the end
    of their document is unknown.

    Raises:
        CorpusError: A document is too long or not UTF-8, or the file is damaged.
    """
    documents = 0
    for offset, piece in _pieces(stream, path, separator):
        documents += 1
        if documents > start.record:
            try:
                text = piece.decode()
            except UnicodeDecodeError as error:
                place = f"byte {offset + error.start:,}" + (" after decompression" if path.suffix != ".txt" else "")
                raise not_utf8(f"corpus file {path}", error, place, _encoding(piece)) from None
            yield rules.plain(text, Cursor(start.file, documents))
    return documents


def _pieces(stream: io.BufferedReader, path: Path, separator: str | None) -> Iterator[tuple[int, bytes]]:
    """Yield (byte offset in the file, bytes) of every document."""
    head = stream.read(len(BYTE_ORDER_MARK))
    rest = bytearray(head.removeprefix(BYTE_ORDER_MARK))
    offset = len(head) - len(rest)
    cut = None if separator is None else separator.encode()
    searched = 0
    while True:
        end = -1 if cut is None else rest.find(cut, searched)
        if max(end, len(rest) if end < 0 else 0) > MAX_DOCUMENT_BYTES:
            what = "the text" if cut is None else f"the document that begins at byte {offset:,}"
            raise too_long(f"corpus file {path}: {what}", "set document_separator of this source")
        if cut is not None and end >= 0:
            yield offset, bytes(rest[:end])
            del rest[: end + len(cut)]
            offset += end + len(cut)
            searched = 0
            continue
        # A separator may begin in the bytes that were searched and end in the next chunk.
        searched = max(0, len(rest) - len(cut or b"") + 1)
        chunk = stream.read(_CHUNK_BYTES)
        if not chunk:
            break
        rest += chunk
    if rest or cut is None:
        yield offset, bytes(rest)


def too_long(what: str, action: str) -> CorpusError:
    """The error of a document above the limit."""
    return CorpusError(
        f"{what} is longer than {MAX_DOCUMENT_BYTES // 2**20} MiB, the limit of one document",
        allowed=f"documents of at most {MAX_DOCUMENT_BYTES:,} bytes",
        action=action,
    )


def not_utf8(where: str, error: UnicodeDecodeError, place: str, action: str) -> CorpusError:
    """The error of text in another encoding, or damaged."""
    return CorpusError(f"{where}: it is not UTF-8 text ({error.reason} at {place})", allowed="UTF-8", action=action)


def _encoding(data: bytes) -> str:
    """The action for bytes that are not UTF-8: a conversion of UTF-8 with a few bad bytes would garble the rest."""
    if b"\0" in data:
        return "it holds NUL bytes, as binary data does: remove the file from corpus.sources"
    text = data.decode("utf-8", "replace")
    bad = text.count("\N{REPLACEMENT CHARACTER}")
    if sum(not character.isascii() for character in text) > 2 * bad:
        return "the rest is UTF-8: correct those bytes, or drop them with iconv -c -f UTF-8 -t UTF-8 OLD > NEW"
    return (
        "find the encoding that the file was written in (WINDOWS-1252 for Western European text, GB18030 for Chinese), "
        "then convert it: iconv -f ENCODING -t UTF-8 OLD > NEW"
    )
