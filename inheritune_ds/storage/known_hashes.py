"""Remembers the sha256 of files, so that a launch does not read gigabytes again that have not changed."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from inheritune_ds.errors import StorageError
from inheritune_ds.storage.files import read_json, sha256_file, storage_errors, write_exact

FILE = "hashes.json"
_SETTLED_NS = 2 * 10**9
"""Age of a file's last change from which its times would show another one, on every file system."""


class KnownHashes:
    """The hashes in the `hashes.json` of a cache folder.

    A file is hashed again if its size, modification time, status change time or inode differs, or if it had changed
    in the two seconds before it was hashed.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._new = folder / FILE, dict[str, Any]()
        self._known = _read(self._path)

    def sha256(self, path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
        """As `storage.files.sha256_file`."""
        began_ns, mark, name = time.time_ns(), _mark(path), str(path.resolve())
        known = self._new.get(name) or self._known.get(name)
        if isinstance(known, list) and known[:-1] == mark:
            advance(mark[0])
            return str(known[-1])
        digest = sha256_file(path, advance)
        if _mark(path) == mark and began_ns - max(mark[1:3]) > _SETTLED_NS:
            self._new[name] = [*mark, digest]
        return digest

    def save(self) -> None:
        """Write the new hashes; a folder that cannot be written is ignored, since the hashes only save time."""
        if self._new:
            with suppress(StorageError):
                with storage_errors(self._path):
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                write_exact(self._path, json.dumps({**_read(self._path), **self._new}))


@contextmanager
def known_hashes(folder: Path) -> Iterator[KnownHashes]:
    """The hashes of a cache folder; new ones are saved at the end, also after an error."""
    hashes = KnownHashes(folder)
    try:
        yield hashes
    finally:
        hashes.save()


def _read(path: Path) -> dict[str, Any]:
    found = read_json(path)
    return found if isinstance(found, dict) else {}


def _mark(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
