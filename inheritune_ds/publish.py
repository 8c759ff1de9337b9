"""Folders that appear whole or not at all: written beside their place, synced, then renamed."""

import errno
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from inheritune_ds.files import sha256_file, storage_errors, sync_folder, sync_path


@contextmanager
def staged(final: Path, usable: Callable[[Path], bool] = lambda _: False) -> Iterator[Path]:
    """Give a hidden folder to fill; publish it as `final` at the end, remove it after an error.

    Two processes may do this at once: the first to finish wins, the other takes what it finds.

    Args:
        final: Folder to appear. One that is there and not usable is replaced.
        usable: Whether a folder that another process has published meanwhile will do.

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


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and sha256 of every file below a folder, by its path inside it."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def has_files(folder: Path, described: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether every described file is there in its full size; hashes are not read."""
    paths = ((folder / name, entry["bytes"]) for name, entry in described.items())
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


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
    sync_folder(staging)
    try:
        staging.rename(final)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        if not usable(final):
            _replace(staging, final)
    sync_path(final.parent)


def _replace(staging: Path, final: Path) -> None:
    broken = staging.with_suffix(".broken.tmp")
    final.rename(broken)
    staging.rename(final)
    if broken.is_dir():
        shutil.rmtree(broken, ignore_errors=True)
    else:
        with suppress(OSError):
            broken.unlink()
