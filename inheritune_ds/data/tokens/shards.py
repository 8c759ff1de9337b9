"""Writes the shards of one part of one source; each ends at the end of a document."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from inheritune_ds.errors import CorpusError
from inheritune_ds.storage.files import storage_errors

SHARD_TOKENS = 100_000_000
"""A shard is closed at the end of the document that reaches this size (200 MB of uint16)."""


class ShardWriter:
    """Appends documents to the shards of a part (`train` or `validation`).

    It continues from `state`, its last committed state; later data is truncated.

    Raises:
        CorpusError: A shard is shorter than in `state`.
        StorageError: The disk refuses.
    """

    def __init__(
        self, folder: Path, part: str, dtype: str, state: Sequence[dict[str, Any]], shard_tokens: int = SHARD_TOKENS
    ) -> None:
        self._folder, self._part, self._shard_tokens = folder, part, shard_tokens
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shards = [dict(shard) for shard in state]
        self._file: BinaryIO | None = None
        kept = {shard["file"] for shard in self._shards}
        with storage_errors(folder):
            folder.mkdir(exist_ok=True)
            for path in folder.glob(f"{part}-*.bin"):
                if path.name not in kept:
                    path.unlink()
            self._refuse_truncated()
            if self._shards and self._shards[-1]["tokens"] < shard_tokens:
                self._file = self._path.open("r+b")
                self._file.truncate(self._shards[-1]["tokens"] * self._dtype.itemsize)
                self._file.seek(0, os.SEEK_END)

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(shard["tokens"] for shard in self._shards)

    @property
    def documents(self) -> int:
        """Documents in all shards."""
        return sum(shard["documents"] for shard in self._shards)

    def append(self, ids: npt.NDArray[Any]) -> bool:
        """Write the ids of a document; returns whether this closed a shard. Raises a StorageError if it is refused."""
        if self._file is None:
            self._shards.append({"file": f"{self._part}-{len(self._shards):05d}.bin", "tokens": 0, "documents": 0})
        with storage_errors(self._path):
            self._file = self._file or self._path.open("wb")
            self._file.write(ids.astype(self._dtype).tobytes())
        shard = self._shards[-1]
        shard["tokens"] += len(ids)
        shard["documents"] += 1
        if shard["tokens"] < self._shard_tokens:
            return False
        self.close()
        return True

    def state(self) -> list[dict[str, Any]]:
        """Flush to disk and return file, tokens and documents of every shard."""
        self._sync()
        return [dict(shard) for shard in self._shards]

    def abandon(self) -> None:
        """Close the open file without flushing to disk; `state` decides which data is truncated next time."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def close(self) -> None:
        """Complete the open file."""
        if self._file is not None:
            self._sync()
            self._file.close()
            self._file = None

    @property
    def _path(self) -> Path:
        return self._folder / str(self._shards[-1]["file"])

    def _refuse_truncated(self) -> None:
        """Check that the files are as long as in the journal: a power failure may have truncated them."""
        for shard in self._shards:
            path = self._folder / str(shard["file"])
            wanted = shard["tokens"] * self._dtype.itemsize
            size = path.stat().st_size if path.is_file() else 0
            if size < wanted:
                raise CorpusError(
                    f"{path} has {size:,} bytes, but {wanted:,} were written: it was truncated during preparation",
                    action=f"remove the folder {self._folder.parent} and rerun the same command",
                )

    def _sync(self) -> None:
        if self._file is not None:
            with storage_errors(self._path):
                self._file.flush()
                os.fsync(self._file.fileno())
