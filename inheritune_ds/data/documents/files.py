"""Reads the documents of local corpus files.

Errors name the file and its line or row. Every record gives one document, with a reason if it is skipped.
"""

import io
import os
import shlex
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

from inheritune_ds.data.documents import compression, tables, text
from inheritune_ds.data.documents.change_check import FileMark, cannot_read
from inheritune_ds.data.documents.records import Cursor, Document, RecordRules, wrong_kind
from inheritune_ds.errors import CorpusError
from inheritune_ds.storage.file_kind import BYTE_ORDER_MARK, HEAD_BYTES, FileKind, kind_of, look
from inheritune_ds.storage.files import read_json

_TEXT_SUFFIXES = (".txt", ".jsonl", ".json")
_TABLES = {".parquet": FileKind.PARQUET, ".arrow": FileKind.ARROW}
_OPEN_TO_ALL = {None, FileKind.EMPTY, FileKind.MARKED, FileKind.JSON_LINES}
_TEXTS = {".txt": _OPEN_TO_ALL | {FileKind.HTML, FileKind.JSON_ARRAY, FileKind.JSON_OBJECT, FileKind.TIKTOKEN}}
"""Kinds that a text file may be, by its format; `_OPEN_TO_ALL` for JSON."""
_LINES = {FileKind.JSON_ARRAY: "jq -c '.[]'", FileKind.JSON_OBJECT: "jq -c ."}
_SAVED_FILES, _SAVED_SPLITS = {"state.json", "dataset_info.json"}, "dataset_dict.json"
"""Files that `datasets.save_to_disk` writes beside the data."""
_UNPACK = {".gz": "gzip -dc", ".bz2": "bzip2 -dc", ".zst": "zstd -dc"}
ALLOWED = ".txt, .jsonl or .json (one JSON object a line), each also with .gz, .bz2 or .zst, and .parquet and .arrow"


def expand(patterns: Sequence[str], folder: Path | None = None) -> list[Path]:
    """List the files that paths, folders and glob patterns match, each once, the matches of each pattern sorted.

    A folder matches all corpus files below it that are not hidden; a pattern matches files only. `folder` is the base
    of relative patterns; None for the current folder.

    Raises:
        CorpusError: A pattern matches no file, or a named file has an unsupported format.
    """
    start = folder or Path.cwd()
    files: dict[Path, Path] = {}
    for pattern in patterns:
        for path in _matches(pattern, start):
            files.setdefault(path.resolve(), path)
    return list(files.values())


def skipped_files(patterns: Sequence[str]) -> list[Path]:
    """List the files in folders among `patterns` that are no corpus files (a README); errors as in `expand`."""
    folders = [Path(pattern).expanduser() for pattern in patterns]
    return [path for folder in folders if folder.is_dir() for path in _below(folder) if not format_of(path)]


def _matches(pattern: str, start: Path) -> list[Path]:
    wanted = start / Path(pattern).expanduser()
    if wanted.is_dir():
        found = [path for path in _below(wanted) if format_of(path)]
        if not found:
            raise CorpusError(
                f"corpus path {pattern!r} is a folder without a corpus file (searched in {start})",
                allowed=ALLOWED,
                action="correct corpus.sources, or convert the files",
            )
        return found
    relative = wanted.relative_to(wanted.anchor)
    found = [wanted] if wanted.is_file() else sorted(p for p in Path(wanted.anchor).glob(str(relative)) if p.is_file())
    if not found:
        raise CorpusError(
            f"corpus path {pattern!r} matches no file (searched in {start})",
            allowed="an existing file or folder, or a glob pattern such as books/*.jsonl.gz",
            action="correct corpus.sources, or start the program in the base folder of the relative paths",
        )
    for path in found:
        if not format_of(path):
            raise CorpusError(
                f"corpus file {path}: files with this suffix are not supported",
                allowed=ALLOWED,
                action="convert or rename it, or narrow the pattern in corpus.sources",
            )
    return found


def _below(folder: Path) -> list[Path]:
    """List all files below a folder that are not hidden, sorted by path."""

    def refuse(error: OSError) -> None:
        raise cannot_read(error.filename, error)

    found: list[Path] = []
    visited: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        # Links may form a circle.
        folders[:] = [name for name in folders if not name.startswith(".")]
        if os.path.realpath(place) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(place))
        if _SAVED_SPLITS in names and len(folders) > 1:
            first = "train" if "train" in folders else folders[0]
            raise CorpusError(
                f"corpus path {place} is a dataset with the splits {', '.join(sorted(folders))}, saved by `datasets`",
                allowed="the folder of one split",
                action=f"name the split to read in corpus.sources, such as {Path(place, first)}",
            )
        saved = _saved_files(Path(place)) if _SAVED_FILES.issubset(names) else names
        found += [Path(place, name) for name in saved if not name.startswith(".")]
    return sorted(path for path in found if path.is_file() and path.name != _SAVED_SPLITS)


def _saved_files(folder: Path) -> list[str]:
    """Names of the data files of a folder that `datasets.save_to_disk` wrote; others hold results of its cache."""
    state = read_json(folder / "state.json")
    try:
        return [str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError):
        raise CorpusError(
            f"corpus path {folder}: its state.json does not list data files, as `datasets` writes them",
            action="save the dataset again, or name its files in corpus.sources",
        ) from None


def format_of(path: Path) -> str:
    """The suffix of a file's format; "" if it is not supported (compressed tables, for example)."""
    if path.suffix in compression.SUFFIXES:
        inner = Path(path.stem).suffix
        return inner if inner in _TEXT_SUFFIXES else ""
    return path.suffix if path.suffix in (*_TEXT_SUFFIXES, *_TABLES) else ""


def read(
    paths: Sequence[Path],
    rules: RecordRules,
    separator: str | None,
    start: Cursor,
    on_bytes: Callable[[int], None],
) -> Iterator[Document]:
    """Yield every record of files in order, skipped ones too; `separator` splits a plain text.

    `start` is the cursor of a document that was read before from the same files; earlier files are not opened, earlier
    lines not parsed, earlier row groups not read. `on_bytes` receives numbers of bytes (on disk) as they are read,
    those before `start` too: in total the sum of the file sizes.

    Raises:
        CorpusError: A file is missing, damaged or changes during reading, or has a bad record and these are refused.
    """
    refuse_fields_of_plain_text(paths, rules)
    counted = 0

    def count(amount: int) -> None:
        nonlocal counted
        counted += amount
        on_bytes(amount)

    for number, path in enumerate(paths):
        mark = FileMark.of(path)
        if number < start.file:
            on_bytes(mark.size)
            continue
        begin = Cursor(number, start.record if number == start.file else 0)
        counted = 0
        try:
            found = yield from records(path, rules, separator, begin, count)
        except CorpusError:
            mark.check()  # if the file was changed, report that as the cause
            raise
        except OSError as error:
            mark.check()
            raise cannot_read(path, error) from None
        mark.check()
        if found < begin.record:
            raise CorpusError(
                f"corpus file {path}: it has {found:,} records, but {begin.record:,} were read from it before",
                action="restore the file, or start over",
            )
        on_bytes(mark.size - counted)


def refuse_fields_of_plain_text(paths: Sequence[Path], rules: RecordRules) -> None:
    """Raise a CorpusError for the first plain text if the filters use fields."""
    for path in paths:
        if format_of(path) == ".txt" and (rules.filters.keep or rules.filters.drop):
            raise CorpusError(
                f"corpus file {path}: plain text has no fields for filters.keep and filters.drop",
                allowed="filters.min_characters and filters.max_characters",
                action="remove keep and drop, or put the .txt files into a separate source",
            )


def records(  # noqa: PLR0913, PLR0917 - the union of the arguments of all readers
    path: Path,
    rules: RecordRules,
    separator: str | None,
    start: Cursor,
    on_bytes: Callable[[int], None],
    file: io.RawIOBase | None = None,
) -> Generator[Document, None, int]:
    """Yield the records of one file after the first `start.record`; returns how many it has.

    If `file` is given (open, such as one on another machine), `path` is only its name. `on_bytes` receives numbers of
    bytes of the file as they are read.

    Raises:
        CorpusError: The file is damaged, or has a bad record and these are refused.
        OSError: The file cannot be read.
    """
    kind = format_of(path)
    if kind in _TABLES and file is None and (found := look(path)) not in (_TABLES[kind], FileKind.EMPTY, None):
        raise wrong_kind(path, found)
    if kind == ".parquet":
        return (yield from tables.parquet(path, rules, start, on_bytes, file))
    if kind == ".arrow":
        return (yield from tables.arrow(path, rules, start, on_bytes))
    with compression.open_unpacked(path, on_bytes, file) as stream:
        _check_text(path, kind, stream.peek(HEAD_BYTES)[:HEAD_BYTES])
        if kind == ".txt":
            return (yield from text.plain_text(stream, path, rules, separator, start))
        return (yield from text.json_lines(stream, path, rules, start))


def _check_text(path: Path, suffix: str, head: bytes) -> None:
    """Raise a CorpusError if an unpacked file that begins with `head` is no text, or JSON that is not in lines."""
    found = kind_of(head)
    if found is FileKind.MARKED and suffix != ".txt":
        found = kind_of(head.removeprefix(BYTE_ORDER_MARK))
    if found in _TEXTS.get(suffix, _OPEN_TO_ALL):
        return
    assert found is not None
    raise wrong_kind(path, found, _into_lines(path, _LINES[found]) if found in _LINES else "")


def _into_lines(path: Path, command: str) -> str:
    """The action that writes a JSON document as lines, into a file beside it."""
    name, new = (shlex.quote(str(path)), shlex.quote(str(path.with_name(f"{path.name.split('.')[0]}-lines.jsonl"))))
    packed = path.suffix in _UNPACK
    written = f"{_UNPACK[path.suffix]} {name} | {command}" if packed else f"{command} {name}"
    return f"write one object a line: {written} > {new}; then name the new file in corpus.sources"
