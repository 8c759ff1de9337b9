"""The data of a run: batches, validation windows, number of steps, tokens seen by source."""

import logging
from collections.abc import Mapping
from functools import cached_property

from inheritune_ds.checkpoints.train_state import TrainState
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.data.stream.batches import BatchStream, build_held_out, build_stream
from inheritune_ds.data.stream.validation_windows import HeldOut
from inheritune_ds.data.stream.windows import TokenShards
from inheritune_ds.data.tokens.token_set import Shard, TokenSet
from inheritune_ds.errors import RecipeError
from inheritune_ds.plan.checks import check_lengths
from inheritune_ds.plan.duration import steps_in
from inheritune_ds.training.packing import DocumentPacking
from inheritune_ds.training.validation import Validator

logger = logging.getLogger(__name__)


class RunData:
    """The windows of a run."""

    def __init__(self, recipe: Recipe, tokens: TokenSet) -> None:
        self._recipe, self.tokens = recipe, tokens

    @cached_property
    def stream(self) -> BatchStream:
        """The batches.

        Raises:
            CorpusError: A source has no window.
        """
        return build_stream(self._recipe, self._open({source.name: source.train for source in self.tokens.sources}))

    @cached_property
    def held_out(self) -> HeldOut:
        """The validation windows."""
        parts = {source.name: source.validation for source in self.tokens.sources}
        return build_held_out(self._recipe, self._open(parts), self.tokens.eos_id)

    @cached_property
    def total_steps(self) -> int:
        """Optimizer steps of the run.

        Raises:
            RecipeError: The duration is shorter than a step, or the lengths contradict each other.
        """
        training = self._recipe.training
        total = steps_in(training, self.stream.num_windows)
        assert total is not None  # unknown only while the corpus is not prepared
        check_lengths(self._recipe, total)
        return total

    @property
    def packing(self) -> DocumentPacking | None:
        """The separation of documents inside a window; None without one.

        Raises:
            RecipeError: The tokenizer begins documents with their end token, so no boundary can be found.
        """
        if self._recipe.training.packing != "documents":
            return None
        form = self.tokens.manifest["document_form"]
        *others, end = form.split(" ")
        if end in others:
            raise RecipeError(
                "training.packing: documents needs a token that occurs at the end of documents only, but the "
                f"tokenizer writes a document as {form!r}",
                allowed=f"a tokenizer that begins a text with another token than {end}, or none",
                action="set add_bos_token to false in its tokenizer_config.json, or use packing: windows",
            )
        return DocumentPacking(self.tokens.eos_id)

    def validator(self, *, batch_size: int, rank: int = 0, size: int = 1) -> Validator:
        """The validation on the recipe's fixed windows, shared among `size` ranks; `batch_size` windows per pass."""
        return Validator(self.held_out, batch_size=batch_size, rank=rank, size=size, packing=self.packing)

    def metrics(self, state: TrainState) -> dict[str, float]:
        """Tokens seen, unique tokens and epochs of every source."""
        metrics: dict[str, float] = {}
        for name, figures in self.by_source(state).items():
            metrics |= {f"data/{name}/{key}": value for key, value in figures.items() if value is not None}
        return metrics

    def by_source(self, state: TrainState) -> dict[str, dict[str, float | None]]:
        """The same as a dictionary per source; `unique_tokens` is None if it cannot be counted (`stream.Coverage`)."""
        length = self._recipe.training.seq_len
        return {
            name: {
                "tokens_seen": seen.windows * length,
                "unique_tokens": None if seen.unique_windows is None else seen.unique_windows * length,
                "epochs": seen.epochs,
            }
            for name, seen in self.stream.seen(state.batch_number, state.skipped_batches).items()
        }

    def unique_tokens(self, state: TrainState) -> int | None:
        """Unique tokens seen; None if they cannot be counted."""
        seen = [figures["unique_tokens"] for figures in self.by_source(state).values()]
        return None if None in seen else int(sum(count or 0 for count in seen))

    def _open(self, parts: Mapping[str, tuple[Shard, ...]]) -> dict[str, TokenShards]:
        dtype = self.tokens.token_dtype
        return {
            name: TokenShards([shard.path for shard in shards], [shard.tokens for shard in shards], dtype)
            for name, shards in parts.items()
        }

    def log(self) -> None:
        """Log the validation windows; warn of parts of corpus and mixture that the run does not use."""
        recipe, used = self._recipe, self.held_out.used
        by_source = f" ({', '.join(f'{name} {windows:,}' for name, windows in used.items())})" if len(used) > 1 else ""
        logger.info(
            "validation: %s of %s held-out windows of %d tokens, evenly spread%s",
            *(f"{len(self.held_out):,}", f"{self.held_out.available:,}", recipe.training.seq_len, by_source),
        )
        untrained = [source.name for source in self.tokens.sources if not source.train_tokens]
        if untrained:
            logger.warning("no token of %s is trained on: empty, held out, or after max_tokens", ", ".join(untrained))
        unseen = [name for name, windows in used.items() if not windows and name not in untrained]
        if unseen:
            logger.warning("no window of %s is validated on: the loss does not include it", ", ".join(unseen))
        for change in recipe.corpus.weight_changes:
            end = self.total_steps * recipe.training.global_batch_tokens
            if change.tokens >= end:
                logger.warning(
                    "weight_changes at %s are never reached: the run ends at %s tokens", change.at, f"{end:,}"
                )
