"""Folders that appear whole or not at all: written beside their place, synced, then renamed."""

import errno
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from inheritune_ds.files import storage_errors


@contextmanager
def staged(final: Path, usable: Callable[[Path], bool]) -> Iterator[Path]:
    """Give a hidden folder to fill; publish it as `final` at the end, remove it after an error.

    Two processes may do this at once: the first to finish wins, the other takes what it finds.

    Args:
        final: Folder to appear. One that is there and not usable is replaced.
        usable: Whether a published folder is complete.

    Raises:
        StorageError: The folder beside `final` cannot be made, synced or renamed.
    """
    host = socket.gethostname()
    staging = final.parent / f".{final.name}.{host}.{os.getpid()}.tmp"
    with storage_errors(final.parent):
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(final.parent, host)
        staging.mkdir()
    try:
        yield staging
        with storage_errors(final):
            _publish(staging, final, usable)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove_leftovers(parent: Path, host: str) -> None:
    """Remove what processes of this machine left that ended without tidying up (SIGKILL, power)."""
    for folder in parent.glob(f".*.{host}.*.tmp"):
        pid = folder.name.removesuffix(".tmp").rpartition(".")[2]
        # A folder with this process's own number was left by an earlier one: ours is not made yet.
        if pid.isdecimal() and (int(pid) == os.getpid() or not _is_alive(int(pid))):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _publish(staging: Path, final: Path, usable: Callable[[Path], bool]) -> None:
    for path in [*staging.rglob("*"), staging]:
        _sync(path)
    try:
        staging.rename(final)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        if not usable(final):
            _replace(staging, final)
    _sync(final.parent)


def _replace(staging: Path, final: Path) -> None:
    broken = staging.with_suffix(".broken.tmp")
    final.rename(broken)
    staging.rename(final)
    if broken.is_dir():
        shutil.rmtree(broken, ignore_errors=True)
    else:
        with suppress(OSError):
            broken.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
