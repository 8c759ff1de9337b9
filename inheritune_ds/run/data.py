"""What a run reads: its batches, its held-out windows, how often it has seen what, and that it is still the same."""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from inheritune_ds.checkpoints.train_state import TrainState
from inheritune_ds.config.loading import differences
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.data.stream.batches import BatchStream, build_held_out, build_stream
from inheritune_ds.data.stream.validation_windows import HeldOut
from inheritune_ds.data.stream.windows import TokenShards
from inheritune_ds.data.tokens.token_set import Shard, TokenSet, find_damage
from inheritune_ds.errors import RecipeError, RunFolderError
from inheritune_ds.plan.checks import check_lengths
from inheritune_ds.plan.duration import steps_in
from inheritune_ds.storage.files import read_json, write_json
from inheritune_ds.training.packing import DocumentPacking

RECORD = "data.json"
"""In the run folder: which data the run is made from."""


class RunData:
    """The windows of a run.

    Args:
        recipe: The experiment.
        tokens: Its token files.
    """

    def __init__(self, recipe: Recipe, tokens: TokenSet) -> None:
        self._recipe, self._tokens = recipe, tokens

    @cached_property
    def stream(self) -> BatchStream:
        """The batches.

        Raises:
            CorpusError: A source has no window.
        """
        return build_stream(self._recipe, self._open({source.name: source.train for source in self._tokens.sources}))

    @cached_property
    def held_out(self) -> HeldOut:
        """The windows for validation."""
        parts = {source.name: source.validation for source in self._tokens.sources}
        return build_held_out(self._recipe, self._open(parts))

    @cached_property
    def total_steps(self) -> int:
        """Optimizer steps of the run.

        Raises:
            RecipeError: The duration is shorter than a step, or the lengths do not go together.
        """
        training = self._recipe.training
        total = steps_in(training, self.stream.num_windows)
        assert total is not None  # unknown only while the corpus is not prepared
        check_lengths(self._recipe, total)
        return total

    @property
    def packing(self) -> DocumentPacking | None:
        """How documents inside a window are kept apart; None if they are not.

        Raises:
            RecipeError: The tokenizer begins documents with the token that ends them, so that it tells of no boundary.
        """
        if self._recipe.training.packing != "documents":
            return None
        form = self._tokens.manifest["document_form"]
        *others, end = form.split(" ")
        if end in others:
            raise RecipeError(
                "training.packing: documents needs a token that stands at the ends of documents only, and the "
                f"tokenizer makes {form!r} of one",
                allowed=f"a tokenizer that puts another token than {end} in front of a text, or none",
                action="set add_bos_token to false in its tokenizer_config.json, or take packing: windows",
            )
        return DocumentPacking(self._tokens.eos_id)

    def metrics(self, state: TrainState) -> dict[str, float]:
        """Of every source, where a run stands: tokens seen, unique ones among them, and epochs."""
        told: dict[str, float] = {}
        for name, figures in self.by_source(state).items():
            told |= {f"data/{name}/{key}": value for key, value in figures.items() if value is not None}
        return told

    def by_source(self, state: TrainState) -> dict[str, dict[str, float | None]]:
        """The same by source; `unique_tokens` is None where it is not a matter of counting (`stream.Seen`)."""
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
        """Different tokens seen; None where that is not a matter of counting."""
        seen = [figures["unique_tokens"] for figures in self.by_source(state).values()]
        return None if None in seen else int(sum(count or 0 for count in seen))

    def _open(self, parts: Mapping[str, tuple[Shard, ...]]) -> dict[str, TokenShards]:
        dtype = self._tokens.token_dtype
        return {
            name: TokenShards([shard.path for shard in shards], [shard.tokens for shard in shards], dtype)
            for name, shards in parts.items()
        }


class DataRecord:
    """`data.json` of a run folder: the fingerprint of its data, and which token files were found as they were written.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / RECORD
        self._written: dict[str, Any] = read_json(self._path) or {}

    def damage_of(self, tokens: TokenSet) -> str | None:
        """What is wrong with token files, by their hashes; files that this run has checked are not read again.

        Args:
            tokens: Token files whose sizes are right.
        """
        return None if self._written.get("verified") == _marks(tokens) else find_damage(tokens)

    def settle(self, recipe: Recipe, tokens: TokenSet, *, has_checkpoints: bool) -> None:
        """Write what the run reads, or compare it with what was written.

        Args:
            recipe: The experiment, with pinned revisions.
            tokens: Its token files, found intact.
            has_checkpoints: Whether training has begun, so that nothing may differ.

        Raises:
            RunFolderError: Something differs; the message says what.
        """
        identity = _identity(recipe, tokens)
        before = self._written.get("identity")
        if has_checkpoints and before is not None and before != identity:
            lines = "\n".join(f"    {line}" for line in differences(_named(before), _named(identity)))
            raise RunFolderError(
                f"{self._path.parent} holds checkpoints that were made from other data; it differs in\n{lines}",
                action="bring the old data and settings back, or give this run a name of its own: name=OTHER",
            )
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        document = {
            "fingerprint": hashlib.sha256(canonical.encode()).hexdigest(),
            "identity": identity,
            "verified": _marks(tokens),
        }
        if document != self._written:
            write_json(self._path, document)
            self._written = document


def _identity(recipe: Recipe, tokens: TokenSet) -> dict[str, Any]:
    """Corpus, tokenizer and stream: all that decides which token stands where."""
    manifest, training = tokens.manifest, recipe.training
    return {
        "tokens": tokens.fingerprint,
        "sources": [
            {
                **entry["identity"],
                "train_tokens": entry["train_tokens"],
                "validation_tokens": entry["validation_tokens"],
            }
            for entry in manifest["sources"]
        ],
        "tokenizer": manifest["tokenizer"]["sha256"],
        "corpus": manifest["corpus"],
        "stream": {
            "seed": recipe.seed,
            "seq_len": training.seq_len,
            "global_batch_tokens": training.global_batch_tokens,
            "sampling": training.sampling,
            "packing": training.packing,
            "weights": recipe.corpus.weights,
            "weight_changes": [change.model_dump(mode="json") for change in recipe.corpus.weight_changes],
        },
        "validation_tokens": recipe.validation.max_tokens,
    }


def _named(value: Any) -> Any:
    """A document whose lists of named things are keyed by name, so that a difference tells source and file."""
    if isinstance(value, dict):
        return {key: _named(item) for key, item in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
        return {item["name"]: _named(item) for item in value}
    return value


def _marks(tokens: TokenSet) -> dict[str, Any]:
    """Size and time of the last change of every token file: what would have changed with its bytes."""
    stats = {name: (tokens.folder / name).stat() for name in sorted(tokens.manifest["files"])}
    return {
        "fingerprint": tokens.fingerprint,
        "files": {name: [found.st_size, found.st_mtime_ns] for name, found in stats.items()},
    }
