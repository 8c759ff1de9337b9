"""Reads the shards of token files as one sequence, and its windows.

Shapes: B windows, T = `seq_len`; a window has T + 1 tokens, the last one only as a target.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from inheritune_ds.errors import CorpusError
from inheritune_ds.plan.duration import windows_in

_SEARCHED_TOKENS = 1 << 20


class TokenShards:
    """Header-free little-endian token files (uint16 or uint32), concatenated and memory-mapped.

    File descriptors are closed after mapping, so thousands of shards need only address space, and a file that is
    removed later can still be read. (numpy's own maps keep a descriptor each; a process may have 1,024.)

    Raises:
        CorpusError: A file is missing, cannot be read or has another number of tokens than `counts`.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int], dtype: str) -> None:
        item = np.dtype(dtype).newbyteorder("<")
        self.arrays = [_mapped(path, count, item) for path, count in zip(paths, counts, strict=True)]
        self._place()

    @classmethod
    def joined(cls, parts: Sequence["TokenShards"]) -> "TokenShards":
        """Concatenate the tokens of several, on the same memory maps."""
        whole = cls([], [], "uint16")
        whole.arrays = [array for part in parts for array in part.arrays]
        whole._place()
        return whole

    def __len__(self) -> int:
        return self._num_tokens

    def find(self, token: int) -> NDArray[np.int64]:
        """Positions of a token in the sequence, in increasing order."""
        found = [
            begin + first + np.flatnonzero(array[first : first + _SEARCHED_TOKENS] == token)
            for begin, array in zip(self._begins.tolist(), self.arrays, strict=True)
            for first in range(0, len(array), _SEARCHED_TOKENS)
        ]
        return np.concatenate([np.empty(0, np.int64), *found])

    def _place(self) -> None:
        """Compute the position of every file in the sequence."""
        ends = np.cumsum([0, *map(len, self.arrays)], dtype=np.int64)
        self._begins, self._num_tokens = ends[:-1], int(ends[-1])

    def read(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Return the tokens (B, length) of spans that begin at `starts` (B,) and may cross the ends of files.

        Raises:
            ValueError: A span begins or ends outside the sequence.
        """
        if starts.size and (starts.min() < 0 or starts.max() + length > len(self)):
            raise ValueError(f"spans of {length} from {starts.min()} to {starts.max()} outside [0, {len(self)})")
        out = np.empty((len(starts), length), dtype=np.int64)
        # The last file that begins at or before the start; an empty file begins at the same position as the next.
        shards = np.searchsorted(self._begins, starts, side="right") - 1
        offsets = starts - self._begins[shards]
        for row, shard, offset in zip(out, shards.tolist(), offsets.tolist(), strict=True):
            part = self.arrays[shard][offset : offset + length]
            if len(part) == length:
                row[:] = part
            else:
                self._read_across(row, shard, offset)
        return out

    def _read_across(self, row: NDArray[np.int64], shard: int, offset: int) -> None:
        """Fill a row that crosses into the next files."""
        filled = 0
        while filled < len(row):
            part = self.arrays[shard][offset : offset + len(row) - filled]
            row[filled : filled + len(part)] = part
            filled, shard, offset = filled + len(part), shard + 1, 0


class Windows:
    """The windows of one source, each with T = `seq_len` inputs."""

    def __init__(self, shards: TokenShards, seq_len: int) -> None:
        self.shards = shards
        self.seq_len = seq_len

    @classmethod
    def of_file(cls, path: Path, dtype: str, seq_len: int, num_tokens: int) -> "Windows":
        """The windows of a single file of `num_tokens` tokens; errors as for `TokenShards`."""
        return cls(TokenShards([path], [num_tokens], dtype), seq_len)

    def __len__(self) -> int:
        return windows_in(len(self.shards), self.seq_len)


class SourceTokens:
    """The tokens of several sources with windows of one length, read together."""

    def __init__(self, sources: Mapping[str, Windows]) -> None:
        self.names = list(sources)
        self.seq_len = next(iter(sources.values())).seq_len
        self.sizes = [len(windows) for windows in sources.values()]
        """Windows of every source."""
        self.counts = [len(windows.shards) for windows in sources.values()]
        """Tokens of every source."""
        self._tokens = TokenShards.joined([windows.shards for windows in sources.values()])
        self._begins = np.cumsum([0, *self.counts], dtype=np.int64)[:-1]

    def find(self, token: int) -> NDArray[np.int64]:
        """Positions of a token in the joined sequence of all sources, in increasing order."""
        return self._tokens.find(token)

    def positions(self, sources: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions (B,) of the tokens `starts` (B,) of `sources` (B,) in the joined sequence."""
        return self._begins[sources] + starts

    def read(self, sources: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the windows (B, T + 1) that begin at the tokens `starts` (B,) of `sources` (B,)."""
        return self._tokens.read(self.positions(sources, starts), self.seq_len + 1)


def _mapped(path: Path, count: int, item: np.dtype[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    expected = count * item.itemsize
    size = path.stat().st_size if path.is_file() else None
    if size != expected:
        found = "is missing" if size is None else f"has {size} bytes"
        raise CorpusError(
            f"{path}: the token file {found}, but its manifest says {expected}",
            action="rerun the same command to remake the tokens",
        )
    if not count:
        return np.empty(0, item)  # an empty file cannot be mapped
    try:
        with pa.memory_map(str(path)) as file:
            # One byte keeps the map; a buffer of the whole file would read ahead megabytes of each shard.
            first = file.read_buffer(1)
            return np.frombuffer(pa.foreign_buffer(first.address, file.size(), base=first), item)
    except OSError as error:
        raise CorpusError(
            f"{path}: the token file cannot be read ({error})",
            action="check its permissions and the disk, then run the same command again",
        ) from None
