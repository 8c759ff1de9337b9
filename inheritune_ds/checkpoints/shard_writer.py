"""Files of a checkpoint: each written once, from its first byte to its last, and hashed while it is written.

torch's zip writer only ever appends. What it hands over goes to the file and to BLAKE3 at the same time, in two threads
that both leave Python's lock. The disk is asked to begin at once, so that the last fsync has little left to wait for.
The hash is that of the bytes in memory: it does not come from the file that it is to prove.
"""

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from blake3 import blake3

from inheritune_ds.errors import StorageError

_PIECE_BYTES = 1 << 23
_INLINE_BYTES = 1 << 16
"""Less than this is hashed at once: handing it to a thread takes longer."""
_SYNC_FILE_RANGE_WRITE = 2  # fcntl.h of Linux
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_shard(state: Any, path: Path, *, needed_bytes: int) -> dict[str, Any]:
    """Write one file as `torch.save` does, without its CRC32, and flush it to the disk.

    The CRC32 would be a third pass over the bytes, over each record of the file by itself; `torch.load` does not ask
    for it, and BLAKE3 takes its place.

    Args:
        state: What the file is to hold.
        path: A file that does not exist yet, in a folder that does.
        needed_bytes: Of the whole checkpoint, for the message.

    Returns:
        `bytes` and `blake3` (hex), as a manifest lists them.

    Raises:
        StorageError: If the disk refuses any of it, with the path and the bytes needed.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="blake3") as hasher, _refusals(path, needed_bytes):
        file = _HashedFile(path, hasher)
        try:
            with _without_crc32():
                torch.save(state, cast("IO[bytes]", file))
            return file.finish()
        finally:
            file.close()


def require_space(folder: Path, checkpoint_bytes: int, *, count: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        folder: Where checkpoints go; the nearest folder above it that exists is asked.
        checkpoint_bytes: Of one checkpoint, all ranks together.
        count: For so many there must be room.

    Raises:
        StorageError: Naming the folder, the bytes needed and the bytes free.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free_bytes, needed_bytes = shutil.disk_usage(there).free, int(count * checkpoint_bytes)
    if free_bytes < needed_bytes:
        several = f"{count} checkpoints of {checkpoint_bytes:,} bytes take" if count > 1 else "a checkpoint takes"
        raise StorageError(
            f"{folder} has {free_bytes:,} bytes free, and {several} {needed_bytes:,}",
            action="free some space, or keep fewer checkpoints (checkpoint.keep)",
        )


@contextmanager
def _refusals(path: Path, needed_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        action = "free some space" if error.errno in _FULL else "see to the disk, or choose another folder"
        raise StorageError(
            f"{path} cannot be written: {error.strerror}; the checkpoint takes {needed_bytes:,} bytes",
            action=f"{action}, then give the same command again: older checkpoints are kept",
        ) from None


@contextmanager
def _without_crc32() -> Iterator[None]:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _find_begin_writing() -> Callable[[int, int, int], object]:
    """sync_file_range(2) where there is one: a hint that waits for nothing and tells no error; the fsync will."""
    call: Any = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is None:
        return lambda _descriptor, _offset, _count: None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return lambda descriptor, offset, count: call(descriptor, offset, count, _SYNC_FILE_RANGE_WRITE)


_begin_writing = _find_begin_writing()


class _HashedFile:
    """What `torch.save` writes to.

    A refusal of the disk is kept for `finish`, and what follows it is dropped: an exception out of `write` would pass
    through torch's C++ writer, whose destructor writes once more.
    """

    def __init__(self, path: Path, hasher: ThreadPoolExecutor) -> None:
        # Not for others to write to, whatever the umask: such a file would not be loaded again.
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._hasher = hasher
        self._digest = blake3()
        self._bytes = 0
        self._refusal: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Take the next bytes; their memory may change as soon as this returns."""
        view = memoryview(data).cast("B")
        if self._refusal is None:
            hashing = None
            if len(view) < _INLINE_BYTES:
                self._digest.update(view)
            else:
                hashing = self._hasher.submit(self._digest.update, view)
            try:
                self._append(view)
            except OSError as error:
                self._refusal = error
            finally:
                if hashing is not None:
                    hashing.result()
        return len(view)

    def flush(self) -> None:
        """Asked for by `torch.save` at its end; `finish` does it."""

    def _append(self, view: memoryview) -> None:
        while len(view):
            written = os.write(self._descriptor, view[:_PIECE_BYTES])
            if written >= _INLINE_BYTES:
                _begin_writing(self._descriptor, self._bytes, written)
            self._bytes += written
            view = view[written:]

    def finish(self) -> dict[str, Any]:
        """Flush the whole file; say what it holds."""
        if self._refusal is not None:
            raise self._refusal
        os.fsync(self._descriptor)
        return {"bytes": self._bytes, "blake3": self._digest.hexdigest()}

    def close(self) -> None:
        """Give the file back, complete or not."""
        os.close(self._descriptor)
