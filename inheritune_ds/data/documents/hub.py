"""Reads the documents of a dataset on the Hugging Face hub, or of a local copy of one.

Streamed, downloaded and cached files all go through the local readers (`readers`), so the documents are the same.
`datasets` opens streamed files and reconnects after a lost connection. Its own readers are not used: they accept a
truncated Zstandard file, fail if a field changes its type within a file, and resume a file at its beginning.
"""

import fnmatch
import glob
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from inheritune_ds.config.corpus import HubSource
from inheritune_ds.config.fields import is_local_path
from inheritune_ds.data.documents import files as readers
from inheritune_ds.data.documents.records import Cursor, Document, RecordRules
from inheritune_ds.errors import CorpusError
from inheritune_ds.storage import hub

LINE_END = "\n"
"""Separates the documents of a .txt file of the hub, as in `datasets`."""

_FOLDERS = r"(?:(?!\.)[^/]+/)*"
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""datasets/data_files.py, KEYWORDS_IN_PATH_NAME_BASE: the word is between punctuation marks or at an end."""


def is_folder(source: HubSource) -> bool:
    """Whether `dataset` is a local folder and not a name of the hub."""
    return is_local_path(source.dataset) or Path(source.dataset).is_dir()


def folder_files(source: HubSource) -> list[Path]:
    """List the files of a local dataset, sorted; raise a CorpusError if there are none, or no such folder."""
    folder = Path(source.dataset).expanduser()
    if not folder.is_dir():
        raise CorpusError(
            f"corpus dataset {source.dataset!r} is a path, but the folder does not exist",
            allowed="a local folder, or a hub id such as allenai/c4",
            action="correct dataset in corpus.sources",
        )
    files = {str(path.relative_to(folder)): path for path in readers.expand([source.data_files], folder)}
    chosen = list(files) if source.split is None else files_of_split(list(files), source.split, f"dataset {folder}")
    return [files[name] for name in chosen]


def repository_of(source: HubSource) -> hub.Repository:
    """Find the dataset's repository and commit, with and without a network; errors as in `hub.resolve`."""
    return hub.resolve(source.dataset, source.revision, "dataset")


def documents(
    source: HubSource,
    start: Cursor = Cursor(),  # noqa: B008 - an immutable tuple
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Iterator[Document]:
    """Yield every record of a dataset's files, sorted by path, skipped ones too.

    `start` is the cursor of a document that was read before from the same commit, streamed or not; earlier files are
    not requested, and of a streamed parquet file only the needed row groups. `on_bytes` receives numbers of bytes of
    the files as they are read; streamed files before `start` do not count.

    Raises:
        CorpusError: No such file or split, a damaged file, or a bad record and these are refused.
        HubError: The hub cannot be reached, has no such dataset, or the connection is lost.
        StorageError: The hub's cache cannot be written.
    """
    rules = RecordRules.of(source)
    if is_folder(source):
        yield from readers.read(folder_files(source), rules, LINE_END, start, on_bytes)
        return
    repository = repository_of(source)
    present = hub.list_files(repository)
    names = _matching(source, repository, present)
    if source.streaming and not repository.offline:
        yield from _streamed(repository, names, rules, start, on_bytes)
        return
    # One pattern if the hub client matches the same files with it, otherwise every path.
    taken = [name for name in present if fnmatch.fnmatch(name, source.data_files)]
    patterns = [source.data_files] if taken == names else [glob.escape(name) for name in names]
    folder = hub.snapshot(repository, patterns)
    yield from readers.read([folder / name for name in names], rules, LINE_END, start, on_bytes)


def _matching(source: HubSource, repository: hub.Repository, present: list[str]) -> list[str]:
    """List the files that `data_files` matches, sorted; raise a CorpusError without any, or for an unknown format."""
    wanted = re.compile(_expression(source.data_files))
    names = [name for name in present if wanted.fullmatch(name)]
    where = f"dataset {source.dataset} at {repository.commit}"
    if not names:
        corpora = [name for name in present if readers.format_of(Path(name))]
        raise CorpusError(
            f"{where} has no file that matches {source.data_files!r}",
            allowed=f"its files: {', '.join(corpora[:5])}{' ...' if len(corpora) > 5 else ''}" if corpora else "",
            action="correct data_files in corpus.sources: a pattern inside the dataset's repository",
        )
    if source.split is not None:
        names = files_of_split(names, source.split, where)
    for name in names:
        kind = readers.format_of(Path(name))
        if not kind or (kind == ".arrow" and source.streaming and not repository.offline):
            raise CorpusError(
                f"{where}: {name}: files with this suffix cannot be {'streamed' if kind else 'read'}",
                allowed=readers.ALLOWED,
                action="set streaming of this source to false" if kind else "narrow data_files in corpus.sources",
            )
    return names


def files_of_split(names: Sequence[str], split: str, where: str) -> list[str]:
    """Select a split's files by the words in the paths: `train`, `validation`, `test`, or another word of a path.

    Raises a CorpusError if no path contains the split, and others contain another one.
    """
    splits_of = {name: _splits_in(name, split) for name in names}
    chosen = [name for name, splits in splits_of.items() if split in splits]
    if chosen:
        return chosen
    others = sorted(set().union(*splits_of.values()))
    if split == "train" and not others:
        return list(names)
    raise CorpusError(
        f"{where} has no file of the split {split!r} among the {len(names)} files that data_files matches",
        allowed=f"the splits in their paths: {', '.join(others) or 'train, because no path names one'}",
        action="correct split of this source, or remove it to read every file that data_files matches",
    )


def _splits_in(name: str, wanted: str) -> set[str]:
    words = {**_SPLIT_WORDS, wanted: _SPLIT_WORDS.get(wanted, (wanted,))}
    path = name.lower()
    return {
        split
        for split, known in words.items()
        if any(re.search(rf"(^|[^a-z0-9]){re.escape(word.lower())}($|[^a-z0-9]|[0-9])", path) for word in known)
    }


def _expression(pattern: str) -> str:
    """A regular expression for a glob pattern; `**` matches any folders, `*` matches no slash."""
    *folders, last = pattern.split("/")
    parts = [_FOLDERS if part == "**" else _part(part) + "/" for part in folders]
    return "".join(parts) + (_FOLDERS + _part("*") if last == "**" else _part(last))


def _part(pattern: str) -> str:
    """A regular expression for one path part of a pattern; hidden names match only if the pattern begins with a dot."""
    visible = "" if pattern.startswith(".") else r"(?!\.)"
    return visible + "".join(map(_word, re.split(r"(\*+|\?|\[[^\]]+\])", pattern)))


def _word(word: str) -> str:
    if word.startswith("*"):
        return "[^/]*"
    if word == "?":
        return "[^/]"
    if word.startswith("[") and word.endswith("]"):
        return f"[^{word[2:]}" if word.startswith("[!") else word
    return re.escape(word)


def _streamed(
    repository: hub.Repository, names: list[str], rules: RecordRules, start: Cursor, on_bytes: Callable[[int], None]
) -> Iterator[Document]:
    paths = [Path(f"{repository.name}@{repository.commit}") / name for name in names]
    readers.refuse_fields_of_plain_text(paths, rules)
    for number, (name, path) in enumerate(zip(names, paths, strict=True)):
        if number >= start.file:
            begin = Cursor(number, start.record if number == start.file else 0)
            with _HubFile(repository, name) as file:
                yield from readers.records(path, rules, LINE_END, begin, on_bytes, file)


class _HubFile(io.RawIOBase):
    """A file of the hub, read during its download; raises the errors of `hub.failure`."""

    def __init__(self, repository: hub.Repository, name: str) -> None:
        super().__init__()
        # Read when `datasets` is imported: do not report downloads.
        os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
        from datasets.download.streaming_download_manager import xopen

        self._repository = repository
        self._file: Any = None
        address = f"hf://datasets/{repository.name}@{repository.commit}/{name}"
        self._file = self._try(lambda: xopen(address, "rb"))

    def _try(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # noqa: BLE001  `datasets` does not convert the errors of its HTTP clients
            raise hub.failure(error, self._repository) from None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._try(lambda: self._file.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._try(lambda: self._file.seek(offset, whence)))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()
