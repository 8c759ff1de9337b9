"""Publish folders atomically: fill a hidden folder, sync it, rename it."""

import errno
import fcntl
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from inheritune_ds.errors import RunFolderError
from inheritune_ds.storage.files import sha256_file, storage_errors, sync_folder, sync_path

logger = logging.getLogger(__name__)


@contextmanager
def staged(
    final: Path,
    usable: Callable[[Path], bool] = lambda _: False,
    replaceable: Callable[[Path], bool] = lambda _: True,
) -> Iterator[Path]:
    """Yield a hidden folder to fill; publish it as `final` at the end, or remove it after an error.

    Two processes may do this at once: the first to finish wins, the other uses its result. `usable` says whether to
    keep the folder that exists at `final` at the end, and discard the filled one; `replaceable`, whether to replace it
    if it is not usable. An empty folder is always replaced.

    Raises:
        StorageError: The folder beside `final` cannot be made, synced or renamed.
        RunFolderError: Something that must not be replaced exists at `final` at the end.
    """
    staging = final.with_name(f".{final.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    with storage_errors(final.parent):
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(final.parent)
    try:
        with storage_errors(final.parent):
            staging.mkdir()
        yield staging
        with storage_errors(final):
            publish(staging, final, usable, replaceable)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Create a folder and lock it while this process fills it; other processes wait for the lock.

    Unlike `staged`, the files stay after an error or a kill, so that the work can resume. Raises a StorageError if the
    folder or its lock cannot be made.
    """
    lock = folder.with_name(f"{folder.name}.lock")
    with storage_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent)
        descriptor = _lock(lock)
    try:
        with storage_errors(folder):
            folder.mkdir(exist_ok=True)
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()  # succeeds only if it is empty
        with suppress(OSError):
            lock.unlink()
        os.close(descriptor)


def _lock(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process fills %s; waiting for it", path.with_suffix(""))
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # the previous owner has removed the file, so this lock excludes no one


def tidy(folder: Path) -> None:
    """Remove the leftovers of a process that was killed between publishing `folder` and the end of `exclusive`."""
    lock = folder.with_name(f"{folder.name}.lock")
    with suppress(OSError):
        _remove_leftovers(folder.parent)
    with suppress(OSError):  # no lock, or another process holds it
        descriptor = os.open(lock, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(OSError):
                folder.rmdir()  # succeeds only if it is empty
            lock.unlink()
        finally:
            os.close(descriptor)


def describe_files(folder: Path, ignored: Container[str] = ()) -> dict[str, dict[str, Any]]:
    """Size in bytes and sha256 of every file below a folder, by relative path; `ignored` paths are skipped."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for name, path in paths.items()
        if name not in ignored
    }


def damaged_files(folder: Path, described: Any, *, hashes: bool = False) -> list[str]:
    """List files that differ in size (with `hashes`, also in hash) from the result of `describe_files`.

    Missing files and entries of another form count as damaged.
    """
    if not isinstance(described, Mapping):
        return ["the list of files"]
    return [name for name, entry in described.items() if not _is_intact(folder / name, entry, hashes=hashes)]


def _is_intact(path: Path, entry: Any, *, hashes: bool) -> bool:
    if not isinstance(entry, Mapping) or not path.is_file() or path.stat().st_size != entry.get("bytes"):
        return False
    return not hashes or sha256_file(path) == entry.get("sha256")


def _remove_leftovers(parent: Path) -> None:
    """Remove temporary folders of ended processes of this machine."""
    name = re.compile(rf"\..*\.{re.escape(socket.gethostname())}\.([0-9]+)(\.broken)?\.tmp")
    for path in list(parent.iterdir()):
        match = name.fullmatch(path.name)
        # An earlier process had this process's id: this one has made no folder yet.
        if match and (int(match.group(1)) == os.getpid() or not _is_alive(int(match.group(1)))):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


def publish(
    staging: Path,
    final: Path,
    usable: Callable[[Path], bool] = lambda _: False,
    replaceable: Callable[[Path], bool] = lambda _: True,
) -> None:
    """Sync a complete folder and rename it to `final`; arguments as in `staged`."""
    sync_folder(staging)
    try:
        staging.rename(final)  # succeeds if `final` is missing or an empty folder
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        if not usable(final):
            if not replaceable(final):
                raise RunFolderError(
                    f"{final} was created by another process in the meantime; it was not changed",
                    action="choose a new folder, or remove this one",
                ) from None
            _replace(staging, final)
    sync_path(final.parent)


def _replace(staging: Path, final: Path) -> None:
    broken = final.with_name(f".{final.name}.{socket.gethostname()}.{os.getpid()}.broken.tmp")
    _remove(broken)
    final.rename(broken)
    try:
        staging.rename(final)
    except BaseException:
        with suppress(OSError):
            broken.rename(final)
        raise
    _remove(broken)
