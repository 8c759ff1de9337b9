"""Local corpus files to documents: text, JSON lines (plain, gzip, Zstandard) and parquet.

Every problem is told with the file and the line or row it stands in.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from inheritune_ds.corpus import FilesSource
from inheritune_ds.errors import CorpusError

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
_PACKED = (".gz", ".zst")
_ALLOWED = ".txt, .jsonl or .json (one JSON object a line), each also with .gz or .zst, and .parquet"
_CHUNK_BYTES = 2**20
_BATCH_ROWS = 1024
# Corpora packed with `zstd --long=31` need a window of this size (RedPajama and the Pile are).
_ZSTD_WINDOW_BYTES = 2**31


def expand(patterns: Sequence[str], folder: Path | None = None) -> list[Path]:
    """List the files that paths and glob patterns mean, each once.

    Args:
        patterns: Paths or patterns, in order; a pattern's matches are sorted.
        folder: Where relative ones start; the current folder when left out.

    Raises:
        CorpusError: One of them matches no file, or a match is of a kind that is not read.
    """
    start = folder or Path.cwd()
    files: dict[Path, Path] = {}
    for pattern in patterns:
        for path in _matches(pattern, start):
            if _kind(path) not in SUFFIXES:
                raise CorpusError(
                    f"corpus file {path}: a file with this ending is not read",
                    allowed=_ALLOWED,
                    action="convert or rename it, or narrow the pattern in corpus.sources",
                )
            files.setdefault(path.resolve(), path)
    return list(files.values())


def _matches(pattern: str, start: Path) -> list[Path]:
    wanted = start / Path(pattern).expanduser()
    if wanted.is_file():
        return [wanted]
    relative = wanted.relative_to(wanted.anchor)
    found = (
        [] if wanted.is_dir() else sorted(path for path in Path(wanted.anchor).glob(str(relative)) if path.is_file())
    )
    if not found:
        what = "is a folder" if wanted.is_dir() else "matches no file"
        hint = f"; to take what is in it, write {pattern.rstrip('/')}/*.jsonl" if wanted.is_dir() else ""
        raise CorpusError(
            f"corpus path {pattern!r} {what} (looked for in {start})",
            allowed="an existing file or a glob pattern such as books/*.jsonl.gz",
            action="correct corpus.sources, or start the program in the folder that the paths are relative to" + hint,
        )
    return found


def _kind(path: Path) -> str:
    """The suffix that tells the format, or "" for a parquet file that is packed once more."""
    if path.suffix not in _PACKED:
        return path.suffix
    inner = Path(path.stem).suffix
    return "" if inner == ".parquet" else inner


def documents(source: FilesSource) -> Iterator[str | None]:
    """Yield what the files of a source hold; None stands for a record whose text is null.

    Raises:
        CorpusError: A file is missing, damaged, or a record in it has no text.
    """
    for path in expand(source.paths):
        kind = _kind(path)
        try:
            if kind == ".parquet":
                yield from _parquet(path, source.text_field)
            else:
                with _open(path) as stream:
                    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n")
                    if kind == ".txt":
                        yield from _plain(text, source.document_separator)
                    else:
                        yield from _json_lines(text, path, source.text_field)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise CorpusError(
                f"corpus file {path}: it is cut off or damaged ({error})",
                action="copy or download it again, then compare its size with the original",
            ) from None
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"corpus file {path}: it is not UTF-8 text ({error.reason} at byte {error.start} of a block)",
                allowed="UTF-8",
                action=f"convert it, such as: iconv -f LATIN1 -t UTF-8 {path.name}",
            ) from None
        except OSError as error:
            raise CorpusError(
                f"corpus file {path}: it cannot be read ({(error.strerror or str(error)).lower()})",
                action="check that it exists and that this user may read it",
            ) from None


def text_of(record: object, field: str, where: str) -> str | None:
    """Take the text out of a record.

    Args:
        record: A parsed JSON object or a row.
        field: Name of the field with the text.
        where: How to call the record in a message, such as `books.jsonl:12`.

    Raises:
        CorpusError: The record is no object, has no such field, or holds something else in it.
    """
    if not isinstance(record, dict):
        raise CorpusError(
            f"{where}: the record is {type(record).__name__}, not an object",
            allowed='one JSON object a line, such as {"text": "..."}',
        )
    if field not in record:
        raise _no_field(where, field, list(record))
    text = record[field]
    if text is not None and not isinstance(text, str):
        raise _no_text(where, field, type(text).__name__)
    return text


def _no_field(where: str, field: str, present: Sequence[str]) -> CorpusError:
    return CorpusError(
        f"{where}: there is no field {field!r}",
        allowed=f"the fields present: {', '.join(map(str, present)) or 'none'}",
        action="set text_field of this source to the one that holds the text",
    )


def _no_text(where: str, field: str, kind: str) -> CorpusError:
    return CorpusError(
        f"{where}: field {field!r} holds {kind}, not text",
        allowed="a string (null counts as an empty document)",
        action="set text_field of this source to the one that holds the text",
    )


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast("BinaryIO", gzip.open(path, "rb"))
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdReader(path), _CHUNK_BYTES)
    return path.open("rb")


class _ZstdReader(io.RawIOBase):
    """Decompresses Zstandard frames; unlike zstandard's own reader it notices a file that is cut off."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._file = path.open("rb")
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
        self._frame = self._decompressor.decompressobj()
        self._inside = False
        self._packed = self._ready = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._packed or self._file.read(_CHUNK_BYTES)
            if not packed:
                if self._inside:
                    raise EOFError("the last Zstandard frame has no end")
                return 0
            try:
                self._ready = self._frame.decompress(packed)
            except self._error as error:
                raise EOFError(str(error)) from None
            self._inside = not self._frame.eof
            self._packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = self._decompressor.decompressobj()
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def _plain(stream: io.TextIOWrapper, separator: str | None) -> Iterator[str]:
    """Cut a text at a separator, a chunk at a time; the whole text is one document without one."""
    if separator is None:
        yield stream.read()
        return
    rest = ""
    while chunk := stream.read(_CHUNK_BYTES):
        *complete, rest = (rest + chunk).split(separator)
        yield from complete
    # A separator at the end of the file ends the last document and begins none.
    if rest:
        yield rest


def _json_lines(stream: io.TextIOWrapper, path: Path, field: str) -> Iterator[str | None]:
    for number, line in enumerate(stream, 1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CorpusError(
                f"{path}:{number}: not a JSON object ({error})",
                allowed="one complete JSON object a line",
                action="mend or remove that line",
            ) from None
        yield text_of(record, field, f"{path}:{number}")


def _parquet(path: Path, field: str) -> Iterator[str | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            schema = table.schema_arrow
            if field not in schema.names:
                raise _no_field(str(path), field, schema.names)
            kind = schema.field(field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                raise _no_text(str(path), field, str(kind))
            for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=[field]):
                yield from batch.column(0).to_pylist()
    except pa.ArrowException as error:
        raise CorpusError(
            f"corpus file {path}: it is not a readable parquet file ({str(error).splitlines()[0]})",
            action="copy or download it again",
        ) from None
