"""Local corpus files to documents: which files a source means, and what is in them, one after the other.

Every problem is told with the file and the line or row it stands in. What is left out is counted by its documents:
every record that is read gives one, with the reason if it has no text to train on.
"""

import io
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

from inheritune_ds.config.corpus import FilesSource
from inheritune_ds.data.documents import compression, tables, text
from inheritune_ds.data.documents.change_check import FileMark, cannot_read
from inheritune_ds.data.documents.records import Cursor, Document, RecordRules
from inheritune_ds.errors import CorpusError

_TEXT_SUFFIXES = (".txt", ".jsonl", ".json")
_TABLE_SUFFIXES = (".parquet", ".arrow")
ALLOWED = ".txt, .jsonl or .json (one JSON object a line), each also with .gz, .bz2 or .zst, and .parquet and .arrow"


def expand(patterns: Sequence[str], folder: Path | None = None) -> list[Path]:
    """List the files that paths, folders and glob patterns mean, each once.

    A folder means all files below it that can be read, hidden ones apart; a pattern means files only.

    Args:
        patterns: Paths, folders or patterns, in order; what one of them matches is sorted.
        folder: Where relative ones start; the current folder when left out.

    Raises:
        CorpusError: One of them matches no file, or a file that was asked for by name or pattern is of a kind
            that is not read.
    """
    start = folder or Path.cwd()
    files: dict[Path, Path] = {}
    for pattern in patterns:
        for path in _matches(pattern, start):
            files.setdefault(path.resolve(), path)
    return list(files.values())


def left_out(patterns: Sequence[str], folder: Path | None = None) -> list[Path]:
    """List the files in folders among `patterns` that are no corpus files by their ending (a README, a licence).

    Args:
        patterns: As for `expand`.
        folder: As for `expand`.

    Raises:
        CorpusError: A folder cannot be read.
    """
    start = folder or Path.cwd()
    folders = [start / Path(pattern).expanduser() for pattern in patterns]
    return [path for found in folders if found.is_dir() for path in _below(found) if not format_of(path)]


def _matches(pattern: str, start: Path) -> list[Path]:
    wanted = start / Path(pattern).expanduser()
    if wanted.is_dir():
        found = [path for path in _below(wanted) if format_of(path)]
        if not found:
            raise CorpusError(
                f"corpus path {pattern!r} is a folder without a file that is read (looked for in {start})",
                allowed=ALLOWED,
                action="correct corpus.sources, or convert the files",
            )
        return found
    relative = wanted.relative_to(wanted.anchor)
    found = [wanted] if wanted.is_file() else sorted(p for p in Path(wanted.anchor).glob(str(relative)) if p.is_file())
    if not found:
        raise CorpusError(
            f"corpus path {pattern!r} matches no file (looked for in {start})",
            allowed="an existing file or folder, or a glob pattern such as books/*.jsonl.gz",
            action="correct corpus.sources, or start the program in the folder that the paths are relative to",
        )
    for path in found:
        if not format_of(path):
            raise CorpusError(
                f"corpus file {path}: a file with this ending is not read",
                allowed=ALLOWED,
                action="convert or rename it, or narrow the pattern in corpus.sources",
            )
    return found


def _below(folder: Path) -> list[Path]:
    """List all files below a folder that are not hidden, sorted by their paths."""

    def refuse(error: OSError) -> None:
        raise cannot_read(error.filename, error)

    found: list[Path] = []
    visited: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        # Links may lead in a circle.
        folders[:] = [name for name in folders if not name.startswith(".")]
        if os.path.realpath(place) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(place))
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def format_of(path: Path) -> str:
    """Say the ending that tells the format; "" for a file that is not read, a table that is packed among them."""
    if path.suffix in compression.SUFFIXES:
        inner = Path(path.stem).suffix
        return inner if inner in _TEXT_SUFFIXES else ""
    return path.suffix if path.suffix in (*_TEXT_SUFFIXES, *_TABLE_SUFFIXES) else ""


def documents(
    source: FilesSource,
    start: Cursor = Cursor(),  # noqa: B008 - an immutable tuple
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Iterator[Document]:
    """Yield every record of a source's files, also one that is left out.

    Args:
        source: The files.
        start: Where to begin: the cursor of a document that was read earlier from the same files. The rest is the
            same as if all had been read. Files that lie before are not opened, lines not parsed, row groups not read.
        on_bytes: Told the bytes of the files (as they lie on the disk) that are done, those before `start` too:
            all told, the sum of their sizes.

    Raises:
        CorpusError: A file is missing, damaged or changes while it is read; a bad record, where these are refused.
    """
    yield from read(expand(source.paths), RecordRules.of(source), source.document_separator, start, on_bytes)


def read(
    paths: Sequence[Path],
    rules: RecordRules,
    separator: str | None,
    start: Cursor,
    on_bytes: Callable[[int], None],
) -> Iterator[Document]:
    """Yield every record of files, in their order; arguments and errors are those of `documents`."""
    refuse_fields_of_plain_text(paths, rules)
    for number, path in enumerate(paths):
        mark = FileMark.of(path)
        if number < start.file:
            on_bytes(mark.size)
            continue
        begin = Cursor(number, start.record if number == start.file else 0)
        told = _Told(on_bytes)
        try:
            found = yield from records(path, rules, separator, begin, told)
        except CorpusError:
            mark.check()  # a change is the cause of whatever was found wrong
            raise
        except OSError as error:
            mark.check()
            raise cannot_read(path, error) from None
        mark.check()
        if found < begin.record:
            raise CorpusError(
                f"corpus file {path}: it has {found:,} records, and {begin.record:,} were read from it before",
                action="put the file back as it was, or begin anew",
            )
        on_bytes(mark.size - told.bytes)


def refuse_fields_of_plain_text(paths: Sequence[Path], rules: RecordRules) -> None:
    """Refuse filters that look at fields where there are none.

    Raises:
        CorpusError: Naming the first such file.
    """
    for path in paths:
        if format_of(path) == ".txt" and (rules.filters.keep or rules.filters.drop):
            raise CorpusError(
                f"corpus file {path}: plain text has no fields that filters.keep and filters.drop could look at",
                allowed="filters.min_characters and filters.max_characters",
                action="leave keep and drop out, or make a source of its own for the .txt files",
            )


class _Told:
    """Passes numbers of bytes on and adds them up."""

    def __init__(self, on_bytes: Callable[[int], None]) -> None:
        self.bytes = 0
        self._on_bytes = on_bytes

    def __call__(self, amount: int) -> None:
        self.bytes += amount
        self._on_bytes(amount)


def records(  # noqa: PLR0913, PLR0917 - what the readers of all formats need together
    path: Path,
    rules: RecordRules,
    separator: str | None,
    start: Cursor,
    on_bytes: Callable[[int], None],
    file: io.RawIOBase | None = None,
) -> Generator[Document, None, int]:
    """Yield the records of one file; returns how many it has.

    Args:
        path: The file; its ending tells the format.
        rules: What is asked of a record.
        separator: What stands between the documents of plain text.
        start: The file's number, and how many records to pass over.
        on_bytes: Told the bytes of the file that are done.
        file: The file where it is open already, such as one on another machine; `path` is then its name only.

    Raises:
        CorpusError: The file is damaged, or has a bad record where these are refused.
        OSError: The file cannot be read.
    """
    kind = format_of(path)
    if kind == ".parquet":
        return (yield from tables.parquet(path, rules, start, on_bytes, file))
    if kind == ".arrow":
        return (yield from tables.arrow(path, rules, start, on_bytes))
    with compression.open_unpacked(path, on_bytes, file) as stream:
        if kind == ".txt":
            return (yield from text.plain_text(stream, path, rules, separator, start))
        return (yield from text.json_lines(stream, path, rules, start))
