"""Reads and identifies the sources of a recipe's corpus."""

import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from inheritune_ds.config.corpus import EmbeddedSource, FilesSource, HubSource, Source, TextSource, TokensSource
from inheritune_ds.config.fields import is_local_path
from inheritune_ds.console import Meter
from inheritune_ds.data.documents import files as readers
from inheritune_ds.data.documents import hub, python_docs
from inheritune_ds.data.documents.change_check import FileMark, cannot_read
from inheritune_ds.data.documents.records import Cursor, Document, RecordRules
from inheritune_ds.errors import CorpusError
from inheritune_ds.storage.files import sha256_file
from inheritune_ds.storage.known_hashes import KnownHashes


def pinned(source: Source) -> Source:
    """The source with a commit instead of a hub branch or tag, which may move meanwhile; errors as in `hub.resolve`."""
    if not isinstance(source, HubSource) or hub.is_folder(source) or re.fullmatch("[0-9a-f]{40}", source.revision):
        return source
    return source.model_copy(update={"revision": hub.repository_of(source).commit})


def identify(
    source: Source, hashes: KnownHashes | None = None, known: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Identify the data of a source, so that changed data is detected.

    `hashes` has those of files that were hashed before; `known` is the entry `files` of an earlier result, in place of
    local files that are gone. The result has the settings that decide which documents are read, wherever they are, and:
    for files, name, size (bytes) and sha256 of each; for the hub, the full commit; for the embedded corpus, the Python
    version and a hash.

    Raises:
        CorpusError: A file is missing.
        HubError: The hub cannot be reached, or has no such dataset.
    """
    if isinstance(source, EmbeddedSource):
        return python_docs.identity()
    settings: dict[str, Any] = {"kind": source.kind}
    if isinstance(source, HubSource):
        settings |= {"split": source.split, "text_field": source.text_field}
        if not hub.is_folder(source):
            commit = hub.repository_of(source).commit
            return settings | {"dataset": source.dataset, "commit": commit, "data_files": source.data_files}
    if isinstance(source, FilesSource):
        settings |= {"text_field": source.text_field, "document_separator": source.document_separator}
    return settings | {"files": _file_identities(_local_files(source), hashes) if known is None else known}


def documents(
    source: TextSource,
    start: Cursor = Cursor(),  # noqa: B008 - an immutable tuple
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Iterator[Document]:
    """Yield every record of a source in order, skipped ones too.

    `start` is the cursor of a document that was read before from the same data. `on_bytes` receives numbers of bytes as
    they are read; their sum is `total_bytes` if that is known.

    Raises:
        CorpusError: A file is missing, damaged or changes during reading, or has a bad record and these are refused.
        HubError: The hub cannot be reached, or has no such dataset.
    """
    if isinstance(source, EmbeddedSource):
        return python_docs.documents(start)
    if isinstance(source, FilesSource):
        paths, rules = readers.expand(source.paths), RecordRules.of(source)
        return readers.read(paths, rules, source.document_separator, start, on_bytes)
    return hub.documents(source, start, on_bytes)


def total_bytes(source: TextSource) -> int | None:
    """Size on disk of the files that `documents` reads; None if it is not known beforehand; errors as in `snapshot`."""
    marks = snapshot(source)
    return sum(mark.size for mark in marks) if marks else None


def snapshot(source: Source) -> tuple[FileMark, ...]:
    """Stat the local files of a source before they are identified and read; raise a CorpusError if one is missing."""
    return tuple(FileMark.of(path) for path in _local_files(source))


def check(source: Source, before: tuple[FileMark, ...]) -> None:
    """Raise a CorpusError if a local file of a source is gone, changed or new since an earlier `snapshot`."""
    for mark in before:
        mark.check()
    known = {mark.path for mark in before}
    for path in _local_files(source):
        if path not in known:
            raise CorpusError(
                f"corpus file {path}: it appeared while the corpus was read",
                action="let its writer finish, then rerun the same command: it reads this file too",
            )


def skipped_files(source: Source) -> list[str]:
    """Names of the files in a source's folders that are not corpus files, such as a README; errors as in `snapshot`."""
    return [path.name for path in readers.skipped_files(source.paths)] if isinstance(source, FilesSource) else []


def _local_files(source: Source) -> list[Path]:
    if isinstance(source, FilesSource):
        return readers.expand(source.paths)
    if isinstance(source, TokensSource):
        return [Path(name).expanduser() for name in (source.train, source.validation) if name is not None]
    if isinstance(source, HubSource) and hub.is_folder(source):
        return hub.folder_files(source)
    return []


def is_missing(source: Source) -> bool:
    """Whether local files of a source cannot be found, maybe since they were removed after tokenization."""
    try:
        return not all(path.exists() for path in _local_files(source))
    except CorpusError:
        return True


def may_have_been(source: Source, names: Sequence[str]) -> bool:
    """Whether the missing local files of a source may have had these names."""
    if isinstance(source, TokensSource):
        return [path.name for path in _local_files(source)] == list(names)
    if not isinstance(source, FilesSource):
        return isinstance(source, HubSource) and is_local_path(source.dataset)
    last = [Path(pattern) for pattern in source.paths]
    return all(any(fnmatch(name, path.name) or not readers.format_of(path) for path in last) for name in names)


def _file_identities(paths: list[Path], hashes: KnownHashes | None) -> list[dict[str, Any]]:
    sizes = [FileMark.of(path).size for path in paths]
    with Meter("hashing corpus files", "bytes", sum(sizes)) as meter:
        return [
            {"name": path.name, "size": size, "sha256": _sha256(path, meter.advance, hashes)}
            for path, size in zip(paths, sizes, strict=True)
        ]


def _sha256(path: Path, advance: Callable[[int], None], hashes: KnownHashes | None) -> str:
    try:
        return (sha256_file if hashes is None else hashes.sha256)(path, advance)
    except OSError as error:
        raise cannot_read(path, error) from None
