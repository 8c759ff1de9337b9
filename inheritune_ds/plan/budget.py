"""The cost of a recipe on given ranks: batch, steps, tokens, FLOPs, memory, disk, download."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from inheritune_ds.config.corpus import HubSource, TrainedTokenizer
from inheritune_ds.config.fields import is_local_path
from inheritune_ds.config.model import Shape
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.config.training import Checkpointing
from inheritune_ds.config.zero import Recomputation, ZeroSettings, read_layout
from inheritune_ds.plan.duration import steps_in, windows_in
from inheritune_ds.plan.memory import Memory, memory
from inheritune_ds.plan.model_size import (
    GIB,
    Parameters,
    checkpoint_bytes,
    flops_per_token,
    hardware_flops_per_token,
    parameters,
)
from inheritune_ds.plan.scaling import Job

_EXPORT_BYTES = {"float32": 4, "bfloat16": 2}
CHECKPOINTS_IN_HAND = 2
"""The one being written, and one more: an old one is deleted after a newer one is verified."""


@dataclass(frozen=True)
class Tokens:
    """Training tokens of a corpus.

    Attributes:
        parts: Tokens of every source; one total while they are an estimate, before the token files are written.
    """

    parts: tuple[int, ...]
    estimate: bool

    @property
    def count(self) -> int:
        """Tokens of all sources."""
        return sum(self.parts)


@dataclass(frozen=True)
class Budget:
    """All figures of one recipe on given ranks; None if they need an unknown model or corpus.

    Attributes:
        micro_batch_size: Sequences per rank and micro-step.
        accumulation: Micro-steps per step.
        job: One step of the target.
        unique: Training tokens of the corpus.
        steps: Optimizer steps.
    """

    recipe: Recipe
    layout: ZeroSettings
    micro_batch_size: int
    accumulation: int
    job: Job | None
    unique: Tokens | None
    steps: int | None

    @cached_property
    def parameters(self) -> Parameters | None:
        """Of the target."""
        return parameters(self.job.shape, self.job.num_blocks) if self.job else None

    @property
    def tokens_a_step(self) -> int:
        """Tokens per step over all ranks."""
        return self.recipe.training.global_batch_tokens

    @property
    def tokens_seen(self) -> int | None:
        """Tokens of the whole run."""
        return None if self.steps is None else self.steps * self.tokens_a_step

    @property
    def epochs(self) -> float | None:
        """Passes over the windows of the corpus."""
        windows = epoch_windows(self.recipe, self.unique)
        return self.tokens_seen / (windows * self.recipe.training.seq_len) if self.tokens_seen and windows else None

    @property
    def flops_a_token(self) -> float | None:
        """FLOPs per token, forward and backward."""
        job = self.job
        return flops_per_token(job.shape, job.num_blocks, self.recipe.training.seq_len) if job else None

    @property
    def flops(self) -> float | None:
        """FLOPs of the whole run."""
        return self.flops_a_token * self.tokens_seen if self.flops_a_token and self.tokens_seen else None

    def floor_flops(self, recomputation: Recomputation = "none") -> float | None:
        """FLOPs that the whole run cannot do without.

        A token of a window attends to (seq_len + 1) / 2 positions on average. Documents that are kept apart have
        unknown lengths: their attention is not counted.
        """
        if self.job is None or self.tokens_seen is None:
            return None
        training = self.recipe.training
        positions = 0.0 if training.packing == "documents" else (training.seq_len + 1) / 2
        return self.tokens_seen * hardware_flops_per_token(
            self.job.shape, self.job.num_blocks, positions, recomputation
        )

    @property
    def checkpoint_bytes(self) -> int | None:
        """Bytes of one checkpoint over all ranks."""
        return checkpoint_bytes(self.parameters.total) if self.parameters else None

    @cached_property
    def memory(self) -> Memory | None:
        """Memory of one GPU."""
        job, sizes = self.job, {"micro_batch_size": self.micro_batch_size, "accumulation": self.accumulation}
        return memory(job.shape, job.num_blocks, **sizes, **self.layout) if job else None

    @cached_property
    def download_gib(self) -> dict[str, float | None]:
        """Downloads from the hub, by name; None for an unknown size."""
        found: dict[str, float | None] = {}
        reference = self.recipe.reference
        if reference and reference.recipe_name is None and not _is_folder(reference.model):
            found[reference.model] = reference.download_gib
        for source in self.recipe.corpus.sources:
            if isinstance(source, HubSource) and not _is_folder(source.dataset):
                others = found.get(source.dataset, 0.0)  # several sources may be files of one dataset
                known = others is not None and source.download_gib is not None
                found[source.dataset] = (others or 0.0) + (source.download_gib or 0.0) if known else None
        return found

    @property
    def disk_gib(self) -> dict[str, float]:
        """Disk space of the run and its inputs, by part."""
        return {**_disk(self), "download": sum(size or 0.0 for size in self.download_gib.values())}


def build_budget(
    recipe: Recipe,
    ds_config: Mapping[str, Any],
    *,
    shape: tuple[Shape, int] | None,
    unique: Tokens | None,
    world_size: int,
) -> Budget:
    """Compute the budget from a resolved DeepSpeed config and, where known, the target's shape and blocks.

    Raises:
        RecipeError: When the duration is shorter than one step.
    """
    documents = recipe.training.packing == "documents"
    layout = read_layout(ds_config, seq_len=recipe.training.seq_len, world_size=world_size, documents=documents)
    sizes = int(ds_config["train_micro_batch_size_per_gpu"]), int(ds_config["gradient_accumulation_steps"])
    job = Job(*shape, layout, *sizes, recipe.training.batch_windows) if shape else None
    return Budget(recipe, layout, *sizes, job, unique, steps_in(recipe.training, epoch_windows(recipe, unique)))


def epoch_windows(recipe: Recipe, unique: Tokens | None) -> int | None:
    """Windows of a corpus; None if its tokens are unknown."""
    return sum(windows_in(part, recipe.training.seq_len) for part in unique.parts) if unique else None


def _is_folder(model: str) -> bool:
    return is_local_path(model) or Path(model).is_dir()


def checkpoints_staying(rule: Checkpointing, steps: int | None) -> int:
    """The largest number of checkpoints kept at once.

    Args:
        rule: The recipe's.
        steps: Of the whole run; None if unknown, then without the checkpoints of `keep_every`.
    """
    if steps is None:
        return rule.keep
    saves = math.ceil(steps / rule.interval_steps)  # one is at the end, wherever that is
    # A run that is often stopped saves between the intervals: then `keep_every` keeps none of the newest.
    multiples = steps // (rule.keep_every * rule.interval_steps) if rule.keep_every else 0
    return min(saves, rule.keep + multiples)


def _disk(budget: Budget) -> dict[str, float]:
    """GiB that the run writes, by part."""
    parts: dict[str, float] = {}
    recipe, count = budget.recipe, budget.parameters
    if count and budget.checkpoint_bytes is not None:
        staying = checkpoints_staying(recipe.checkpoint, budget.steps)
        at_least = "at least " if budget.steps is None and recipe.checkpoint.keep_every else ""
        name = f"checkpoints ({at_least}{staying} kept, {CHECKPOINTS_IN_HAND} in hand)"
        parts[name] = (staying + CHECKPOINTS_IN_HAND) * budget.checkpoint_bytes / GIB
        parts["target before training (fp32; less in the reference's own type)"] = count.total * 4 / GIB
        parts["export"] = count.total * _EXPORT_BYTES[recipe.export.dtype] / GIB
    if budget.unique:
        all_tokens = budget.unique.count / (1.0 - recipe.corpus.validation_ratio)
        parts["token files"] = all_tokens * _token_bytes(recipe, budget.job) / GIB
    return parts


def _token_bytes(recipe: Recipe, job: Job | None) -> int:
    """Bytes of one token in the token files: 2 up to a vocabulary of 65,536, else 4."""
    tokenizer = recipe.corpus.tokenizer
    number_type = recipe.corpus.token_dtype
    if number_type != "auto":
        return {"uint16": 2, "uint32": 4}[number_type]
    vocabulary = tokenizer if isinstance(tokenizer, TrainedTokenizer) else job.shape if job else None
    return 2 if vocabulary is None or vocabulary.vocab_size <= 2**16 else 4
