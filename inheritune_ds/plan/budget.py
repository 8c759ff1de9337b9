"""What a recipe costs on given ranks: batch, steps, tokens, FLOPs, memory, disk, download, and a claim checked."""

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
from inheritune_ds.config.zero import ZeroSettings, read_layout
from inheritune_ds.plan.duration import steps_in, windows_in
from inheritune_ds.plan.memory import Memory, memory
from inheritune_ds.plan.model_size import GIB, Parameters, checkpoint_bytes, flops_per_token, parameters
from inheritune_ds.plan.scaling import Job

_EXPORT_BYTES = {"float32": 4, "bfloat16": 2}
CHECKPOINTS_IN_HAND = 2
"""The one being written, and one more: an old one goes when a newer one is verified."""


@dataclass(frozen=True)
class Tokens:
    """Training tokens of a corpus.

    Attributes:
        parts: Tokens of every source; of all together as long as they are estimated.
        estimate: Until the token files are written.
    """

    parts: tuple[int, ...]
    estimate: bool

    @property
    def count(self) -> int:
        """Tokens of all sources."""
        return sum(self.parts)


@dataclass(frozen=True)
class Budget:
    """All figures of one recipe on given ranks; None where the model or the corpus is not known yet.

    Attributes:
        recipe: The experiment.
        layout: How DeepSpeed lays the model out.
        micro_batch_size: Sequences a rank holds at once.
        accumulation: Micro-steps a step.
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
        """Over all ranks."""
        return self.recipe.training.global_batch_tokens

    @property
    def tokens_seen(self) -> int | None:
        """In the whole run."""
        return None if self.steps is None else self.steps * self.tokens_a_step

    @property
    def epochs(self) -> float | None:
        """Passes over the whole windows of the corpus."""
        windows = epoch_windows(self.recipe, self.unique)
        return self.tokens_seen / (windows * self.recipe.training.seq_len) if self.tokens_seen and windows else None

    @property
    def flops_a_token(self) -> float | None:
        """Forward and backward, see `budget`."""
        job = self.job
        return flops_per_token(job.shape, job.num_blocks, self.recipe.training.seq_len) if job else None

    @property
    def flops(self) -> float | None:
        """Of the whole run."""
        return self.flops_a_token * self.tokens_seen if self.flops_a_token and self.tokens_seen else None

    @property
    def checkpoint_bytes(self) -> int | None:
        """One checkpoint, all ranks."""
        return checkpoint_bytes(self.parameters.total) if self.parameters else None

    @cached_property
    def memory(self) -> Memory | None:
        """Of one GPU."""
        job, sizes = self.job, {"micro_batch_size": self.micro_batch_size, "accumulation": self.accumulation}
        return memory(job.shape, job.num_blocks, **sizes, **self.layout) if job else None

    @cached_property
    def download_gib(self) -> dict[str, float | None]:
        """What is fetched, by name; None for a size that is not known."""
        return _downloads(self.recipe)

    @property
    def disk_gib(self) -> dict[str, float]:
        """What the run and its inputs take on disk, by part."""
        return {
            **_checkpoints(self),
            **_disk(self),
            "download": sum(size or 0.0 for size in self.download_gib.values()),
        }


def build_budget(
    recipe: Recipe,
    ds_config: Mapping[str, Any],
    *,
    shape: tuple[Shape, int] | None,
    unique: Tokens | None,
    world_size: int,
) -> Budget:
    """Gather what all figures follow from.

    Args:
        recipe: The experiment.
        ds_config: The resolved DeepSpeed config (no `auto` left).
        shape: The target's shape and blocks; None when they are not known.
        unique: Training tokens of the corpus; None when they are not known.
        world_size: Ranks.

    Raises:
        RecipeError: When the duration is shorter than one step.
    """
    layout = layout_of(ds_config, recipe, world_size)
    sizes = int(ds_config["train_micro_batch_size_per_gpu"]), int(ds_config["gradient_accumulation_steps"])
    job = Job(*shape, layout, *sizes, recipe.training.batch_windows) if shape else None
    return Budget(recipe, layout, *sizes, job, unique, steps_in(recipe.training, epoch_windows(recipe, unique)))


def epoch_windows(recipe: Recipe, unique: Tokens | None) -> int | None:
    """Windows of a corpus; None when its tokens are not known."""
    return sum(windows_in(part, recipe.training.seq_len) for part in unique.parts) if unique else None


def layout_of(ds_config: Mapping[str, Any], recipe: Recipe, world_size: int) -> ZeroSettings:
    """Read out of a resolved DeepSpeed config how a recipe's target is laid out."""
    return read_layout(ds_config, seq_len=recipe.training.seq_len, world_size=world_size)


def _downloads(recipe: Recipe) -> dict[str, float | None]:
    """Sizes of what the hub is asked for, in GiB."""
    found: dict[str, float | None] = {}
    reference = recipe.reference
    if reference and reference.recipe_name is None and not _is_folder(reference.model):
        found[reference.model] = reference.download_gib
    for source in recipe.corpus.sources:
        if isinstance(source, HubSource) and not _is_folder(source.dataset):
            others = found.get(source.dataset, 0.0)  # several sources may be files of one dataset
            unknown = others is None or source.download_gib is None
            found[source.dataset] = None if unknown else (others or 0.0) + (source.download_gib or 0.0)
    return found


def _is_folder(model: str) -> bool:
    return is_local_path(model) or Path(model).is_dir()


def checkpoints_staying(rule: Checkpointing, steps: int | None) -> int:
    """How many checkpoints the rule lets stay at once, at most.

    Args:
        rule: When they are saved and which stay.
        steps: Of the whole run; None while they are not known: those that `keep_every` keeps are not counted then.
    """
    if steps is None:
        return rule.keep
    saves = math.ceil(steps / rule.interval_steps)  # one is at the end, wherever that is
    # A run that is often stopped saves between the intervals: then none of the newest is one that stays for good.
    for_good = steps // (rule.keep_every * rule.interval_steps) if rule.keep_every else 0
    return min(saves, rule.keep + for_good)


def _checkpoints(budget: Budget) -> dict[str, float]:
    """GiB of all checkpoints that lie there at once."""
    if budget.checkpoint_bytes is None:
        return {}
    rule, steps = budget.recipe.checkpoint, budget.steps
    staying = checkpoints_staying(rule, steps)
    at_least = "at least " if steps is None and rule.keep_every else ""
    name = f"checkpoints ({at_least}{staying} kept, {CHECKPOINTS_IN_HAND} in hand)"
    return {name: (staying + CHECKPOINTS_IN_HAND) * budget.checkpoint_bytes / GIB}


def _disk(budget: Budget) -> dict[str, float]:
    """GiB of what else a run writes."""
    parts: dict[str, float] = {}
    recipe, count = budget.recipe, budget.parameters
    if count:
        parts["target before training (fp32; less in the reference's own type)"] = count.total * 4 / GIB
        parts["export"] = count.total * _EXPORT_BYTES[recipe.export.dtype] / GIB
    if budget.unique:
        all_tokens = budget.unique.count / (1.0 - recipe.corpus.validation_ratio)
        parts["token files"] = all_tokens * _token_bytes(recipe, budget.job) / GIB
    return parts


def _token_bytes(recipe: Recipe, job: Job | None) -> int:
    """Bytes of one token in the token files: 2 up to a vocabulary of 65,536, else 4."""
    number_type, tokenizer = recipe.corpus.token_dtype, recipe.corpus.tokenizer
    if number_type == "auto":
        vocabulary = tokenizer if isinstance(tokenizer, TrainedTokenizer) else job.shape if job else None
        entries = vocabulary.vocab_size if vocabulary else 0
        return 2 if entries <= 2**16 else 4
    return {"uint16": 2, "uint32": 4}[number_type]
