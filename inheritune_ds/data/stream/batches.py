"""Tokens on disk to batches; which window comes when is a pure function of the seed and the step.

Nothing is drawn and nothing is remembered: the window at any position is computed from the seed, so
a run continues at any step at once, with any number of ranks, and sees what it would have seen.

Shapes: B windows, T = `seq_len`; a window is T tokens and the one that follows, T + 1 in all.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from inheritune_ds.config.recipe import Recipe
from inheritune_ds.data.stream.mixture import Even, InTurn, Mixture, Weighted, Weights, weights_of
from inheritune_ds.data.stream.order import Order, RandomOrder, SequentialOrder, ShuffledOrder, order_seeds
from inheritune_ds.data.stream.validation_windows import HeldOut
from inheritune_ds.data.stream.windows import SourceTokens, TokenShards, Windows
from inheritune_ds.errors import CorpusError

Sampling = Literal["shuffled", "random", "sequential"]


class Draw(NamedTuple):
    """The windows of a step in their global sequence, each array (batch_windows,).

    Attributes:
        sources: Numbers of their sources.
        epochs: How often that source had been gone through before.
        places: Number of the window in its source; with `random` sampling the number of its first token.
    """

    sources: NDArray[np.int64]
    epochs: NDArray[np.int64]
    places: NDArray[np.int64]


class Coverage(NamedTuple):
    """What has been read of a source.

    Attributes:
        windows: Windows drawn.
        unique_windows: Different ones among them; None where that is not a matter of counting: with `random` sampling,
            and after the first epoch of a source of which windows were left out.
        epochs: Windows drawn / windows of the source.
    """

    windows: int
    unique_windows: int | None
    epochs: float


class BatchStream:
    """Global batches cut into the micro-batches of ranks; the step is the whole state.

    Step s (from 0) takes the windows at positions [s * batch_windows, (s + 1) * batch_windows).
    Row j of micro-batch m on rank r is number m * (world_size * micro_batch_size) +
    r * micro_batch_size + j among them: world size and accumulation change who reads a window,
    never which windows make a step.

    Args:
        sources: Name -> windows of each; a window never reaches from one source into the next.
        seed: Of the run, in [0, 2**64).
        batch_windows: Windows of a step over all ranks and micro-batches.
        sampling: How the windows of a source follow each other.
        weights: Of the sources, as `weights_of` gives them; None takes the sources as one.

    Raises:
        CorpusError: A source has no window.
        ValueError: The batch is empty, or as for `SourceTokens`.
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
        if batch_windows < 1:
            raise ValueError(f"batch_windows must be at least 1, not {batch_windows}")
        self.batch_windows = batch_windows
        self._tokens = SourceTokens(sources)
        self._refuse_short()
        self._random = sampling == "random"
        self._mixture = _mixture(self._tokens, sampling, weights)
        self._order = _order(self._tokens, sampling, seed)

    @property
    def num_windows(self) -> int:
        """Windows of all sources."""
        return sum(self._tokens.sizes)

    def draw(self, step: int) -> Draw:
        """Say which windows make a step.

        Raises:
            ValueError: The step is negative.
        """
        return self._draw(self._positions(step))

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
        positions_MRB = self._positions(step).reshape(-1, world_size, micro_batch_size)  # noqa: N806  (shape suffix)
        own = self._draw(positions_MRB[:, rank].ravel())
        starts = own.places if self._random else own.places * self._tokens.seq_len
        return (
            self._tokens.read(own.sources[first : first + micro_batch_size], starts[first : first + micro_batch_size])
            for first in range(0, len(starts), micro_batch_size)
        )

    def seen(self, end: int, left_out: Sequence[tuple[int, int]] = ()) -> dict[str, Coverage]:
        """Say what has been read of every source.

        Args:
            end: Batches from 0 up to this one, without it.
            left_out: Ranges of batches among them that were not read, first to end, apart from each other.
        """
        drawn = np.array(self._drawn_before(end))
        skipped = sum(
            (
                np.array(self._drawn_before(min(stop, end))) - self._drawn_before(min(first, end))
                for first, stop in left_out
            ),
            start=np.zeros_like(drawn),
        )
        return {
            name: self._seen(int(windows), int(missed), size)
            for name, windows, missed, size in zip(self._tokens.names, drawn, skipped, self._tokens.sizes, strict=True)
        }

    def _drawn_before(self, number: int) -> Sequence[int]:
        return self._mixture.turns_before(number * self.batch_windows)

    def _seen(self, drawn: int, skipped: int, size: int) -> Coverage:
        """After an epoch a window that was skipped may have come again, or not: counting does not tell."""
        windows = drawn - skipped
        countable = not self._random and (drawn <= size or not skipped)
        return Coverage(windows, min(windows, size) if countable else None, windows / size)

    def _positions(self, step: int) -> NDArray[np.int64]:
        if step < 0:
            raise ValueError(f"step must be at least 0, not {step}")
        first = step * self.batch_windows
        return np.arange(first, first + self.batch_windows, dtype=np.int64)

    def _draw(self, positions: NDArray[np.int64]) -> Draw:
        sources, turns = self._mixture.at(positions)
        return Draw(sources, *self._order.at(sources, turns))

    def _refuse_short(self) -> None:
        for name, size, count in zip(self._tokens.names, self._tokens.sizes, self._tokens.counts, strict=True):
            if not size:
                raise CorpusError(
                    f"the training part of source {name!r} has {count} tokens, less than one window of "
                    f"training.seq_len = {self._tokens.seq_len}",
                    action="give the source more documents or a higher max_tokens, take it out of corpus.sources or "
                    "lower training.seq_len",
                )


def build_stream(recipe: Recipe, shards: Mapping[str, TokenShards]) -> BatchStream:
    """The batches of a recipe; without weights, sources that have no token at all are left out.

    Args:
        recipe: What is asked for.
        shards: Name of every source -> its training tokens.

    Raises:
        CorpusError: A source has no window.
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


def build_held_out(recipe: Recipe, shards: Mapping[str, TokenShards]) -> HeldOut:
    """The held-out windows of a recipe, mixed by the weights at its start.

    Args:
        recipe: What is asked for.
        shards: Name of every source -> its held-out tokens.
    """
    weights = weights_of(recipe.corpus, recipe.training.seq_len)
    return HeldOut(_windows(recipe, shards), None if weights is None else weights[0].shares)


def _windows(recipe: Recipe, shards: Mapping[str, TokenShards]) -> dict[str, Windows]:
    """Windows of the sources in the recipe's order, whichever order the shards are given in."""
    return {source.name: Windows(shards[source.name], recipe.training.seq_len) for source in recipe.corpus.sources}


def _mixture(tokens: SourceTokens, sampling: Sampling, weights: Sequence[Weights] | None) -> Mixture:
    if weights is not None:
        return Weighted(weights)
    return InTurn(tokens.sizes) if sampling == "sequential" else Even(tokens.sizes)


def _order(tokens: SourceTokens, sampling: Sampling, seed: int) -> Order:
    seeds = order_seeds(seed, tokens.names)
    if sampling == "shuffled":
        return ShuffledOrder(tokens.sizes, seeds)
    if sampling == "sequential":
        return SequentialOrder(tokens.sizes)
    return RandomOrder(tokens.sizes, [count - tokens.seq_len for count in tokens.counts], seeds)
