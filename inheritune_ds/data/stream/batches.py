"""From tokens on disk to batches; each step's windows are a pure function of the seed and the step.

There is no state: the window at any position is computed from the seed. So a run resumes at any step at once, with any
number of ranks, with the same windows as without interruption.

Shapes: B windows, T = `seq_len`; a window has T + 1 tokens, the last one only as a target.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from inheritune_ds.config.recipe import Recipe
from inheritune_ds.data.stream.mixture import Even, InTurn, Mixture, Weighted, Weights, weights_of
from inheritune_ds.data.stream.order import Order, order_seeds, random_order, sequential_order, shuffled_order
from inheritune_ds.data.stream.validation_windows import HeldOut
from inheritune_ds.data.stream.windows import SourceTokens, TokenShards, Windows
from inheritune_ds.errors import CorpusError

Sampling = Literal["shuffled", "random", "sequential"]


class Draw(NamedTuple):
    """The windows of a step in their global sequence, each array (batch_windows,).

    `epochs` counts earlier epochs of the source; `places` are numbers of windows in their source, with `random`
    sampling of their first tokens.
    """

    sources: NDArray[np.int64]
    epochs: NDArray[np.int64]
    places: NDArray[np.int64]


class Coverage(NamedTuple):
    """The part of a source that has been read; `epochs` is windows drawn / windows of the source.

    `unique_windows` is None if they cannot be counted: with `random` sampling, and after the first epoch of a source
    with skipped windows.
    """

    windows: int
    unique_windows: int | None
    epochs: float


class BatchStream:
    """Global batches split into the micro-batches of ranks; the step is the whole state.

    Step s (from 0) uses the windows at positions [s * batch_windows, (s + 1) * batch_windows). Row j of micro-batch m
    on rank r is number m * (world_size * micro_batch_size) + r * micro_batch_size + j among them: world size and
    accumulation change the rank that reads a window, never the windows of a step. A window never spans two sources;
    `weights` is the result of `weights_of`, None concatenates the sources.

    Raises:
        CorpusError: A source has no window.
    """

    def __init__(
        self,
        sources: Mapping[str, Windows],
        *,
        seed: int,
        batch_windows: int,
        sampling: Sampling = "shuffled",
        weights: Sequence[Weights] | None = None,
    ) -> None:
        self.batch_windows = batch_windows
        self._tokens = SourceTokens(sources)
        for name, size, count in zip(self._tokens.names, self._tokens.sizes, self._tokens.counts, strict=True):
            if not size:
                raise CorpusError(
                    f"the training part of source {name!r} has {count} tokens, fewer than one window of "
                    f"training.seq_len = {self._tokens.seq_len}",
                    action="add documents to the source, raise its max_tokens, remove it from corpus.sources or "
                    "lower training.seq_len",
                )
        self._random = sampling == "random"
        self._mixture = _mixture(self._tokens, sampling, weights)
        self._order = _order(self._tokens, sampling, seed)

    @property
    def num_windows(self) -> int:
        """Windows of all sources."""
        return sum(self._tokens.sizes)

    def draw(self, step: int) -> Draw:
        """Return the windows of a step."""
        return self._draw(self._positions(step))

    def micro_batches(
        self, step: int, *, rank: int, world_size: int, micro_batch_size: int
    ) -> Iterator[NDArray[np.int64]]:
        """Yield the micro-batches that a rank reads at a step.

        Yields:
            (micro_batch_size, T + 1) token ids, batch_windows / (world_size * micro_batch_size) times.
        """
        positions_MRB = self._positions(step).reshape(-1, world_size, micro_batch_size)  # noqa: N806  (shape suffix)
        own = self._draw(positions_MRB[:, rank].ravel())
        starts = own.places if self._random else own.places * self._tokens.seq_len
        return (
            self._tokens.read(own.sources[first : first + micro_batch_size], starts[first : first + micro_batch_size])
            for first in range(0, len(starts), micro_batch_size)
        )

    def seen(self, end: int, skipped: Sequence[tuple[int, int]] = ()) -> dict[str, Coverage]:
        """Return the coverage of every source by batches [0, end) without the disjoint ranges [first, stop) skipped."""
        drawn = self._drawn_before(end)
        missed = np.zeros_like(drawn)
        for first, stop in skipped:
            missed += self._drawn_before(min(stop, end)) - self._drawn_before(min(first, end))
        counts = zip(drawn.tolist(), missed.tolist(), self._tokens.sizes, strict=True)
        return {name: self._seen(*count) for name, count in zip(self._tokens.names, counts, strict=True)}

    def _drawn_before(self, number: int) -> NDArray[np.int64]:
        return np.array(self._mixture.turns_before(number * self.batch_windows), dtype=np.int64)

    def _seen(self, drawn: int, skipped: int, size: int) -> Coverage:
        """After an epoch, a skipped window may have come again or not: the windows cannot be counted."""
        windows = drawn - skipped
        countable = not self._random and (drawn <= size or not skipped)
        return Coverage(windows, min(windows, size) if countable else None, windows / size)

    def _positions(self, step: int) -> NDArray[np.int64]:
        first = step * self.batch_windows
        return np.arange(first, first + self.batch_windows, dtype=np.int64)

    def _draw(self, positions: NDArray[np.int64]) -> Draw:
        sources, turns = self._mixture.at(positions)
        return Draw(sources, *self._order(sources, turns))


def build_stream(recipe: Recipe, shards: Mapping[str, TokenShards]) -> BatchStream:
    """The batches of a recipe from the training tokens of its sources; without weights, empty sources are skipped.

    Errors as for `BatchStream`.
    """
    training, windows = recipe.training, _windows(recipe, shards)
    if recipe.corpus.weights is None:
        windows = {name: own for name, own in windows.items() if len(own.shards)} or windows
    return BatchStream(
        windows,
        seed=recipe.seed,
        batch_windows=training.batch_windows,
        sampling=training.sampling,
        weights=weights_of(recipe.corpus, training.seq_len),
    )


def build_held_out(recipe: Recipe, shards: Mapping[str, TokenShards], eos_id: int) -> HeldOut:
    """The validation windows of a recipe, mixed by the weights at its start."""
    seq_len = recipe.training.seq_len
    weights = weights_of(recipe.corpus, seq_len)
    return HeldOut(
        _windows(recipe, shards),
        limit=recipe.validation.max_tokens // seq_len,
        eos_id=eos_id,
        shares=None if weights is None else weights[0].shares,
    )


def _windows(recipe: Recipe, shards: Mapping[str, TokenShards]) -> dict[str, Windows]:
    """Windows of the sources in the recipe's order."""
    return {source.name: Windows(shards[source.name], recipe.training.seq_len) for source in recipe.corpus.sources}


def _mixture(tokens: SourceTokens, sampling: Sampling, weights: Sequence[Weights] | None) -> Mixture:
    if weights is not None:
        return Weighted(weights)
    return InTurn(tokens.sizes) if sampling == "sequential" else Even(tokens.sizes)


def _order(tokens: SourceTokens, sampling: Sampling, seed: int) -> Order:
    seeds = order_seeds(seed, tokens.names)
    if sampling == "shuffled":
        return shuffled_order(tokens.sizes, seeds)
    if sampling == "sequential":
        return sequential_order(tokens.sizes)
    return random_order(tokens.sizes, [count - tokens.seq_len for count in tokens.counts], seeds)
