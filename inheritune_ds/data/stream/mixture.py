"""Selects the source of each window of the stream: pure functions of the position, for any position at once.

A position is the number of windows before it in the run; the turns of a source are its windows before the position.

Shapes: B positions, S sources.
"""

import bisect
import heapq
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from inheritune_ds.config.corpus import Corpus, shares

_HALF = 20
MAX_WINDOWS = 1 << 2 * _HALF
"""Most windows of all sources without weights: products must fit 64 bits."""

Turns = tuple[NDArray[np.int64], NDArray[np.int64]]


class Weights(NamedTuple):
    """Turns of every source in a round (0 if unused), from the first round that begins at or after position `mark`."""

    mark: int
    shares: tuple[int, ...]


def weights_of(corpus: Corpus, seq_len: int) -> list[Weights] | None:
    """Weights of a corpus and their changes, with marks in windows (rounded up); None if it has no weights."""
    if corpus.weights is None:
        return None
    names = [source.name for source in corpus.sources]
    changes = [
        Weights(-(-change.tokens // seq_len), tuple(shares([change.weights[name] for name in names])))
        for change in corpus.weight_changes
    ]
    return [Weights(0, tuple(shares(corpus.weights))), *changes]


class Weighted:
    """Sources by weight, in rounds of D windows in which source i has a_i turns; the first weights have mark 0.

    The turns of a round are spread such that after any k windows the count of each source differs from k * a_i / D by
    less than one window: its turn j is in [floor(j * D / a_i), ceil((j + 1) * D / a_i)). Baruah, Cohen, Plaxton, Varvel
    1996, "Proportionate progress", prove that such a sequence exists; taking the turn with the nearest end finds it
    (earliest deadline first, exact for jobs of one slot). New weights begin with a round, so this also holds across
    changes.
    """

    def __init__(self, weights: Sequence[Weights]) -> None:
        self._shares = [part.shares for part in weights]
        self.starts = [0]
        """Positions from which each of the weights holds."""
        for before, part in pairwise(weights):
            length = sum(before.shares)
            rounds = max(0, -(-(part.mark - self.starts[-1]) // length))
            self.starts.append(self.starts[-1] + rounds * length)
        self._bases = [[0] * len(weights[0].shares)]
        for (start, end), turns in zip(pairwise(self.starts), self._shares, strict=False):
            rounds = (end - start) // sum(turns)
            self._bases.append([base + rounds * turn for base, turn in zip(self._bases[-1], turns, strict=True)])

    def at(self, positions: NDArray[np.int64]) -> Turns:
        """Map positions (B,) to source numbers (B,) and earlier turns of that source (B,)."""
        parts = np.searchsorted(self.starts, positions, side="right") - 1
        sources, turns = np.empty_like(positions), np.empty_like(positions)
        for part in np.unique(parts).tolist():
            chosen = np.flatnonzero(parts == part)
            shares_S = np.array(self._shares[part])  # noqa: N806 - shape suffix
            bases_S = np.array(self._bases[part])  # noqa: N806
            table, before = round_table(self._shares[part])
            rounds, slots = np.divmod(positions[chosen] - self.starts[part], len(table))
            found = table[slots].astype(np.int64)
            sources[chosen] = found
            turns[chosen] = bases_S[found] + rounds * shares_S[found] + before[slots]
        return sources, turns

    def turns_before(self, position: int) -> list[int]:
        """Turns of every source before a position."""
        part = bisect.bisect_right(self.starts, position) - 1
        turns = self._shares[part]
        table, _ = round_table(turns)
        rounds, slots = divmod(position - self.starts[part], len(table))
        inside = np.bincount(table[:slots], minlength=len(turns)).tolist()
        return [base + rounds * turn + more for base, turn, more in zip(self._bases[part], turns, inside, strict=True)]


class Even:
    """Sources without weights: every window of each once per epoch, spread evenly over the epoch.

    Of o windows of an epoch, the first source has floor(o * n / N), with n its windows and N those of all sources; the
    next source has its part of the remainder by the same rule, and so on. A source is never more than one window behind
    its part, or more than S - 1 ahead. More than `MAX_WINDOWS` in all raise a ValueError.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        if sum(sizes) > MAX_WINDOWS:
            raise ValueError(f"{sum(sizes)} windows are more than {MAX_WINDOWS}")
        self._sizes = list(sizes)

    def at(self, positions: NDArray[np.int64]) -> Turns:
        """See `Weighted.at`."""
        left = sum(self._sizes)
        epochs, offsets = np.divmod(positions, np.int64(left))
        sources = np.full_like(positions, len(self._sizes) - 1)
        rest = np.arange(len(positions))
        for source, size in enumerate(self._sizes[:-1]):
            before = _part(offsets[rest], size, left)
            here = _part(offsets[rest] + 1, size, left) > before
            sources[rest[here]], offsets[rest[here]] = source, before[here]
            rest, before = rest[~here], before[~here]
            offsets[rest] -= before
            left -= size
        return sources, epochs * np.array(self._sizes)[sources] + offsets

    def turns_before(self, position: int) -> list[int]:
        """See `Weighted.turns_before`."""
        left = sum(self._sizes)
        epochs, offset = divmod(position, left)
        found = []
        for size in self._sizes:
            before = offset * size // left if left else 0
            found.append(epochs * size + before)
            offset, left = offset - before, left - size
        return found


class InTurn:
    """Sources without weights one after the other, repeated."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = np.array(sizes, dtype=np.int64)
        self._begins = np.cumsum([0, *sizes], dtype=np.int64)[:-1]

    def at(self, positions: NDArray[np.int64]) -> Turns:
        """See `Weighted.at`."""
        epochs, offsets = np.divmod(positions, self._sizes.sum())
        sources = np.searchsorted(self._begins, offsets, side="right") - 1
        return sources, epochs * self._sizes[sources] + offsets - self._begins[sources]

    def turns_before(self, position: int) -> list[int]:
        """See `Weighted.turns_before`."""
        epochs, offset = divmod(position, int(self._sizes.sum()))
        found: list[int] = (epochs * self._sizes + np.clip(offset - self._begins, 0, self._sizes)).tolist()
        return found


Mixture = Weighted | Even | InTurn


@cache
def round_table(turns: tuple[int, ...]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Schedule a round of `Weighted`; returns the source (D,) of each slot and its earlier turns (D,) in the round."""
    length = sum(turns)
    waiting = [(0, source) for source, count in enumerate(turns) if count]
    ready: list[tuple[int, int]] = []
    done = [0] * len(turns)
    table, before = np.empty(length, np.int32), np.empty(length, np.int32)
    for slot in range(length):
        while waiting and waiting[0][0] <= slot:
            source = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (-(-(done[source] + 1) * length // turns[source]), source))
        source = heapq.heappop(ready)[1]
        table[slot], before[slot] = source, done[source]
        done[source] += 1
        if done[source] < turns[source]:
            heapq.heappush(waiting, (done[source] * length // turns[source], source))
    return table, before


def _part(counts: NDArray[np.int64], size: int, whole: int) -> NDArray[np.int64]:
    """floor(count * size / whole) for counts and sizes up to `MAX_WINDOWS`, without overflow of 64 bits."""
    high, low = counts >> _HALF, counts & ((1 << _HALF) - 1)
    quotient, remainder = np.divmod(high * size, np.int64(whole))
    part: NDArray[np.int64] = (quotient << _HALF) + ((remainder << _HALF) + low * size) // whole
    return part
