"""The validation windows: spread over the whole held-out part, in a fixed order, the same for all runs."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from inheritune_ds.data.stream.mixture import Even, round_table
from inheritune_ds.data.stream.windows import SourceTokens, Windows

_HASHED_WINDOWS = 256


class HeldOut:
    """At most `limit` held-out windows, none twice.

    Every source gives windows in the order of its text, evenly strided over its whole held-out part. With weights
    (`shares`: turns per round), sources take turns as in training; when one has no more windows, the others continue,
    and a source of weight 0 is last. Without weights, sources have windows in proportion to their held-out parts.
    `eos_id` ends every document.
    """

    def __init__(
        self, sources: Mapping[str, Windows], *, limit: int, eos_id: int, shares: Sequence[int] | None = None
    ) -> None:
        self._tokens, self._eos_id = SourceTokens(sources), eos_id
        sizes = self._tokens.sizes
        self.available = sum(sizes)
        """Windows of the whole held-out part."""
        if shares is None:
            self._sources, _ = Even(sizes).at(np.arange(min(limit, self.available), dtype=np.int64))
        else:
            self._sources = _taking_turns(sizes, tuple(shares))[:limit]
        used = np.bincount(self._sources, minlength=len(sizes)).tolist()
        self.used: dict[str, int] = dict(zip(sources, used, strict=True))
        """Windows of every source."""
        self._ids = np.empty_like(self._sources)
        for source, (size, count) in enumerate(zip(sizes, used, strict=True)):
            self._ids[self._sources == source] = strided(size, count)
        self._ends = self._tokens.find(eos_id)

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def seq_len(self) -> int:
        """T, the inputs of a window."""
        return self._tokens.seq_len

    def read(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the token ids (B, T + 1) of the windows at places (B,) in the order."""
        return self._tokens.read(self._sources[numbers], self._starts(numbers))

    def _starts(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """First tokens (B,) of windows in their sources."""
        return self._ids[numbers] * self.seq_len

    def documents(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of the document (B, T) of every target of the windows at places (B,) in the order.

        Documents are numbered over all sources in the order of their text. The end token belongs to the document that
        it ends.
        """
        sources = self._sources[numbers]
        first = self._tokens.positions(sources, self._starts(numbers))
        # A new source begins a new document, also after one that a limit has cut before its end token.
        before = np.searchsorted(self._ends, first) + sources
        ended = self.read(numbers)[:, :-1] == self._eos_id
        documents: NDArray[np.int64] = before[:, None] + np.cumsum(ended, axis=1)
        return documents

    def sha256(self) -> str:
        """Hash (hex) of the windows in their order: their token ids as 32-bit numbers."""
        digest = hashlib.sha256()
        for first in range(0, len(self), _HASHED_WINDOWS):
            rows = self.read(np.arange(first, min(first + _HASHED_WINDOWS, len(self))))
            digest.update(rows.astype("<u4").tobytes())
        return digest.hexdigest()


def strided(size: int, count: int) -> NDArray[np.int64]:
    """`count` of `size` windows, in the middles of as many equal parts; all of them if the two are equal."""
    return (2 * np.arange(count, dtype=np.int64) + 1) * size // max(2 * count, 1)


def _taking_turns(sizes: Sequence[int], shares: tuple[int, ...]) -> NDArray[np.int64]:
    """Sources (windows,) by their turns in endless rounds, all windows."""
    table, _ = round_table(shares)
    positions = []
    for source, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        rounds, turns = np.divmod(np.arange(size), max(share, 1))
        # A source of weight 0 comes after all rounds of the others.
        slots = np.flatnonzero(table == source) if share else np.array([(1 + max(sizes)) * len(table)])
        positions.append(rounds * len(table) + slots[turns])
    order = np.argsort(np.concatenate(positions), kind="stable")
    return np.repeat(np.arange(len(sizes)), sizes)[order]
