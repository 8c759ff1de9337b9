"""Tokens on disk to batches; which window comes when is a pure function of the seed and the step.

Nothing is drawn and nothing is remembered: the window at any position is computed from the seed, so
a run continues at any step at once, with any number of ranks, and sees what it would have seen.

Shapes: B windows, T = `seq_len`; a window is T tokens and the one that follows, T + 1 in all.
"""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from inheritune_ds.errors import CorpusError

_ROUNDS = 8
# splitmix64: the golden-ratio increment and the two multipliers of its finalizer
# (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"; Stafford's mix 13).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def windows_in(num_tokens: int, seq_len: int) -> int:
    """Count the windows of a token file.

    Window w is `tokens[w * T : w * T + T + 1]`: neighbours share one token, the last of one being
    the first of the next, so every token but the first is a target exactly once.

    Args:
        num_tokens: Tokens in the file.
        seq_len: T, the inputs of a window.
    """
    return max(0, num_tokens - 1) // seq_len


class TokenWindows:
    """The windows of a header-free little-endian token file, read through a memory map.

    Args:
        path: The file.
        dtype: `uint16` or `uint32`.
        seq_len: T, the inputs of a window.
        num_tokens: Tokens that the file must hold.

    Raises:
        CorpusError: The file is missing or does not hold `num_tokens` tokens.
    """

    def __init__(self, path: Path, dtype: str, seq_len: int, num_tokens: int) -> None:
        item = np.dtype(dtype).newbyteorder("<")
        expected = num_tokens * item.itemsize
        size = path.stat().st_size if path.is_file() else None
        if size != expected:
            found = "is missing" if size is None else f"has {size} bytes"
            raise CorpusError(
                f"{path}: the token file {found}, its manifest says {expected}",
                action=f"remove the folder {path.parent} and run the same command again: the tokens are made anew",
            )
        self.seq_len = seq_len
        self._num_windows = windows_in(num_tokens, seq_len)
        # An empty file cannot be mapped; it has no windows either.
        self._tokens = np.memmap(path, dtype=item, mode="r") if num_tokens else np.empty(0, item)
        self._columns = np.arange(seq_len + 1, dtype=np.int64)

    def __len__(self) -> int:
        return self._num_windows

    def sha256(self, count: int) -> str:
        """Hash (hex) of the token ids of the first windows, whichever integer type the file has.

        Args:
            count: How many windows.
        """
        return hashlib.sha256(self._tokens[: count * self.seq_len + 1].astype("<u4").tobytes()).hexdigest()

    def read(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Read windows.

        Args:
            ids: (B,) window numbers, each in [0, len(self)).

        Returns:
            (B, T + 1) token ids: columns [0, T) are inputs, columns [1, T + 1) their targets.

        Raises:
            ValueError: An id is out of range.
        """
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise ValueError(f"window ids {ids.min()} to {ids.max()} outside [0, {len(self)})")
        tokens_BT: NDArray[np.int64] = self._tokens[ids[:, None] * self.seq_len + self._columns].astype(np.int64)  # noqa: N806
        return tokens_BT


class WindowOrder:
    """An endless order of windows: every epoch is another permutation of all of them.

    Position p belongs to epoch p // n. Inside an epoch, the permutation is a Feistel network keyed
    by (seed, epoch) over the pairs (left, right), left < a, right < b, with a * b the smallest such
    product not below n; values that fall outside [0, n) walk on along their cycle (Black, Rogaway
    2002, "Ciphers with arbitrary finite domains", methods 2 and 3). The integer mixing is written
    out here because the streams of numpy's generators may change between its versions.

    Args:
        num_windows: n, at least 1.
        seed: Any integer in [0, 2**64).

    Raises:
        ValueError: There is no window to order.
    """

    def __init__(self, num_windows: int, seed: int) -> None:
        if num_windows < 1:
            raise ValueError(f"num_windows must be at least 1, not {num_windows}")
        self.num_windows = num_windows
        self._left_size = np.uint64(math.isqrt(num_windows - 1) + 1)
        self._right_size = np.uint64(-(-num_windows // int(self._left_size)))
        self._seed_state = _mix(np.array([seed], dtype=np.uint64) + _GOLDEN)

    def at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Look up what stands at positions of the endless order.

        Args:
            positions: (B,) positions from 0 on, in any order.

        Returns:
            (B,) epochs from 0 on, and (B,) window ids in [0, n).
        """
        epochs, offsets = np.divmod(positions, np.int64(self.num_windows))
        distinct, which = np.unique(epochs, return_inverse=True)
        keys = self._keys(distinct.astype(np.uint64))[:, which]
        ids = self._permute(offsets.astype(np.uint64), keys)
        outside = np.flatnonzero(ids >= self.num_windows)
        while outside.size:
            ids[outside] = self._permute(ids[outside], keys[:, outside])
            outside = outside[ids[outside] >= self.num_windows]
        return epochs, ids.astype(np.int64)

    def _keys(self, epochs: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Round keys (rounds, E) of epochs (E,)."""
        states = _mix(self._seed_state + epochs * _GOLDEN)
        rounds = np.arange(1, _ROUNDS + 1, dtype=np.uint64)[:, None]
        return _mix(states + rounds * _GOLDEN)

    def _permute(self, values: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Apply the Feistel network once to values in [0, a * b)."""
        left, right = np.divmod(values, self._right_size)
        for number, key in enumerate(keys):
            if number % 2:
                right = (right + _mix(left + key) % self._right_size) % self._right_size
            else:
                left = (left + _mix(right + key) % self._left_size) % self._left_size
        return left * self._right_size + right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finalize as splitmix64 does: a bijection of 64-bit integers in which every bit reaches every bit."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))


class BatchStream:
    """Global batches cut into the micro-batches of ranks; the step is the whole state.

    Step s (from 0) takes the windows at positions [s * batch_windows, (s + 1) * batch_windows).
    Row j of micro-batch m on rank r is number m * (world_size * micro_batch_size) +
    r * micro_batch_size + j among them: world size and accumulation change who reads a window,
    never which windows make a step.

    Args:
        windows: The token file.
        order: The order of its windows.
        batch_windows: Windows of a step over all ranks and micro-batches.

    Raises:
        ValueError: The order is of another number of windows, or the batch is empty.
    """

    def __init__(self, windows: TokenWindows, order: WindowOrder, batch_windows: int) -> None:
        if order.num_windows != len(windows):
            raise ValueError(f"the order is of {order.num_windows} windows, the file has {len(windows)}")
        if batch_windows < 1:
            raise ValueError(f"batch_windows must be at least 1, not {batch_windows}")
        self.windows = windows
        self.order = order
        self.batch_windows = batch_windows

    def window_ids(self, step: int) -> NDArray[np.int64]:
        """Return the (batch_windows,) window ids of a step, in their global sequence.

        Raises:
            ValueError: The step is negative.
        """
        if step < 0:
            raise ValueError(f"step must be at least 0, not {step}")
        first = step * self.batch_windows
        return self.order.at(np.arange(first, first + self.batch_windows, dtype=np.int64))[1]

    def micro_batches(
        self, step: int, *, rank: int, world_size: int, micro_batch_size: int
    ) -> Iterator[NDArray[np.int64]]:
        """Yield the micro-batches that a rank reads at a step.

        Args:
            step: Number of the optimizer step, from 0.
            rank: In [0, world_size).
            world_size: Ranks that share the step.
            micro_batch_size: Windows a rank takes at a time.

        Yields:
            (micro_batch_size, T + 1) token ids, batch_windows / (world_size * micro_batch_size) times.

        Raises:
            ValueError: The batch does not divide, or there is no such rank or step.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} outside [0, {world_size})")
        if micro_batch_size < 1 or self.batch_windows % (world_size * micro_batch_size):
            raise ValueError(
                f"batch_windows {self.batch_windows} does not divide into {world_size} ranks "
                f"x {micro_batch_size} windows"
            )
        ids_MRB = self.window_ids(step).reshape(-1, world_size, micro_batch_size)  # noqa: N806  (shape suffix)
        return (self.windows.read(ids_B) for ids_B in ids_MRB[:, rank])
