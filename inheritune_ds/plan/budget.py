"""What a recipe costs on given ranks: batch, steps, tokens, FLOPs, memory, disk, download, and a claim checked."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inheritune_ds.config.corpus import HubSource, TrainedTokenizer
from inheritune_ds.config.fields import is_local_path
from inheritune_ds.config.model import Shape
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.config.training import Checkpointing
from inheritune_ds.config.zero import ZeroSettings, read_layout
from inheritune_ds.data.size import Tokens
from inheritune_ds.plan.duration import steps_in, tokens_an_epoch
from inheritune_ds.plan.memory import Memory, memory
from inheritune_ds.plan.model_size import GIB, Parameters, checkpoint_bytes, flops_per_token, parameters
from inheritune_ds.plan.scaling import Job

_EXPORT_BYTES = {"float32": 4, "bfloat16": 2}
CHECKPOINTS_IN_HAND = 2
"""The one being written, and one more: an old one goes when a newer one is verified."""


@dataclass(frozen=True)
class Budget:
    """All figures of one recipe on given ranks; None where the model or the corpus is not known yet.

    Attributes:
        num_blocks: Transformer blocks of the target.
        parameters: Of the target.
        micro_batch_size: Sequences a rank holds at once.
        accumulation: Micro-steps a step.
        layout: How DeepSpeed lays the model out.
        tokens_a_step: Over all ranks.
        steps: Optimizer steps.
        unique: Tokens of the corpus.
        tokens_seen: steps x tokens_a_step.
        epochs: Passes over the whole windows of the corpus.
        flops_a_token: Forward and backward, see `budget`.
        flops: Of the whole run.
        checkpoint_bytes: One checkpoint, all ranks.
        disk_gib: What the run and its inputs take on disk, by part.
        download_gib: What is fetched, by name; None for a size that is not known.
        memory: Of one GPU.
        job: One step of the target.
    """

    num_blocks: int | None
    parameters: Parameters | None
    micro_batch_size: int
    accumulation: int
    layout: ZeroSettings
    tokens_a_step: int
    steps: int | None
    unique: Tokens | None
    tokens_seen: int | None
    epochs: float | None
    flops_a_token: float | None
    flops: float | None
    checkpoint_bytes: int | None
    disk_gib: Mapping[str, float]
    download_gib: Mapping[str, float | None]
    memory: Memory | None
    job: Job | None


def build_budget(
    recipe: Recipe,
    ds_config: Mapping[str, Any],
    *,
    shape: tuple[Shape, int] | None,
    unique: Tokens | None,
    world_size: int,
) -> Budget:
    """Gather every figure.

    Args:
        recipe: The experiment.
        ds_config: The resolved DeepSpeed config (no `auto` left).
        shape: The target's shape and blocks; None when they are not known.
        unique: Training tokens of the corpus; None when they are not known.
        world_size: Ranks.

    Raises:
        RecipeError: When the duration is shorter than one step.
    """
    training, layout = recipe.training, layout_of(ds_config, recipe, world_size)
    micro_batch_size = int(ds_config["train_micro_batch_size_per_gpu"])
    accumulation = int(ds_config["gradient_accumulation_steps"])
    epoch = sum(tokens_an_epoch(part, training.seq_len) for part in unique.parts) if unique else None
    steps = steps_in(training, epoch)
    seen = None if steps is None else steps * training.global_batch_tokens
    count = parameters(*shape) if shape else None
    a_token = flops_per_token(*shape, training.seq_len) if shape else None
    saved = checkpoint_bytes(count.total, layout["precision"]) if count else None
    download = _downloads(recipe)
    fetched = sum(size or 0.0 for size in download.values())
    return Budget(
        num_blocks=shape[1] if shape else None,
        parameters=count,
        micro_batch_size=micro_batch_size,
        accumulation=accumulation,
        layout=layout,
        tokens_a_step=training.global_batch_tokens,
        steps=steps,
        unique=unique,
        tokens_seen=seen,
        epochs=seen / epoch if seen and epoch else None,
        flops_a_token=a_token,
        flops=a_token * seen if a_token and seen else None,
        checkpoint_bytes=saved,
        disk_gib={
            **(_checkpoints(recipe.checkpoint, steps, saved) if saved else {}),
            **_disk(recipe, count, unique, shape),
            "download": fetched,
        },
        download_gib=download,
        memory=memory(*shape, micro_batch_size=micro_batch_size, accumulation=accumulation, **layout)
        if shape
        else None,
        job=Job(*shape, layout, micro_batch_size, accumulation, training.batch_windows) if shape else None,
    )


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


def _checkpoints(rule: Checkpointing, steps: int | None, saved: int) -> dict[str, float]:
    """GiB of all checkpoints that lie there at once."""
    staying = checkpoints_staying(rule, steps)
    at_least = "at least " if steps is None and rule.keep_every else ""
    name = f"checkpoints ({at_least}{staying} kept, {CHECKPOINTS_IN_HAND} in hand)"
    return {name: (staying + CHECKPOINTS_IN_HAND) * saved / GIB}


def _disk(
    recipe: Recipe, count: Parameters | None, unique: Tokens | None, shape: tuple[Shape, int] | None
) -> dict[str, float]:
    """GiB of what else a run writes."""
    parts: dict[str, float] = {}
    if count:
        parts["target before training (fp32; less in the reference's own type)"] = count.total * 4 / GIB
        parts["export"] = count.total * _EXPORT_BYTES[recipe.export.dtype] / GIB
    if unique:
        all_tokens = unique.count / (1.0 - recipe.corpus.validation_ratio)
        parts["token files"] = all_tokens * _token_bytes(recipe, shape) / GIB
    return parts


def _token_bytes(recipe: Recipe, shape: tuple[Shape, int] | None) -> int:
    """Bytes of one token in the token files: 2 up to a vocabulary of 65,536, else 4."""
    number_type, tokenizer = recipe.corpus.token_dtype, recipe.corpus.tokenizer
    if number_type == "auto":
        entries = (
            tokenizer.vocab_size if isinstance(tokenizer, TrainedTokenizer) else shape[0].vocab_size if shape else 0
        )
        return 2 if entries <= 2**16 else 4
    return {"uint16": 2, "uint32": 4}[number_type]
