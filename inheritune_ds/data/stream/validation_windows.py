"""The held-out windows in a fixed order; any first part of it mixes the sources in proportion."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from inheritune_ds.data.stream.mixture import Even, round_table
from inheritune_ds.data.stream.windows import SourceTokens, Windows


class HeldOut:
    """The held-out windows of all sources, each once.

    With weights (`shares`: turns per round), sources take turns as in training, each in the order of its text; when one
    has no more windows, the others continue, and a source of weight 0 is last. Without weights they are spread evenly,
    so that any first part has them in proportion to their held-out parts.
    """

    def __init__(self, sources: Mapping[str, Windows], shares: Sequence[int] | None = None) -> None:
        self._windows = dict(sources)
        self._tokens = SourceTokens(sources)
        sizes = self._tokens.sizes
        if shares is None:
            self._sources, self._ids = Even(sizes).at(np.arange(sum(sizes), dtype=np.int64))
        else:
            self._sources, self._ids = _taking_turns(sizes, tuple(shares))

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def seq_len(self) -> int:
        """T, the inputs of a window."""
        return self._tokens.seq_len

    def read(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the token ids (B, T + 1) of the windows at places (B,) in the order."""
        return self._tokens.read(self._sources[numbers], self._ids[numbers] * self.seq_len)

    def used(self, count: int) -> dict[str, int]:
        """Windows of every source among the first `count`."""
        windows = np.bincount(self._sources[:count], minlength=len(self._windows)).tolist()
        return dict(zip(self._windows, windows, strict=True))

    def sha256(self, count: int) -> str:
        """Hash (hex) of the first `count` windows: their token ids as 32-bit numbers, and their order.

        Models are compared window by window, so the order counts.
        """
        digest = hashlib.sha256()
        for name, windows in self.used(count).items():
            self._windows[name].hash_into(digest, windows)
        if len(self._windows) > 1:  # each source keeps its own order, so only the turns are missing
            digest.update(self._sources[:count].astype("<u4").tobytes())
        return digest.hexdigest()


def _taking_turns(sizes: Sequence[int], shares: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sources and windows, both (windows,), by their position in endless rounds."""
    table, _ = round_table(shares)
    positions = []
    for source, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        rounds, turns = np.divmod(np.arange(size), max(share, 1))
        # A source of weight 0 comes after all rounds of the others.
        slots = np.flatnonzero(table == source) if share else np.array([(1 + max(sizes)) * len(table)])
        positions.append(rounds * len(table) + slots[turns])
    order = np.argsort(np.concatenate(positions), kind="stable")
    sources = np.repeat(np.arange(len(sizes)), sizes)
    ids = np.concatenate([np.arange(size) for size in sizes])
    return sources[order], ids[order]
