"""`--auto-micro-batch`: try real steps, take the largest micro-batch that fits, and keep to it when the run goes on."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from inheritune_ds.budget import memory
from inheritune_ds.checkpoint_store import newest_step
from inheritune_ds.errors import RecipeError
from inheritune_ds.files import read_json, write_json
from inheritune_ds.layout import read_layout
from inheritune_ds.recipe import Recipe
from inheritune_ds.shapes import target_shape
from inheritune_ds.surgery.reference import load_model
from inheritune_ds.training.ds_config import MICRO_BATCH, Machine, Resolved
from inheritune_ds.training.engine import Engine
from inheritune_ds.training.kernels import Kernels
from inheritune_ds.training.meeting import Meeting
from inheritune_ds.training.micro_batch import (
    USABLE_RATIO,
    divisors,
    largest_that_fits,
    measure_peak,
    smallest,
)
from inheritune_ds.training.packing import DocumentPacking
from inheritune_ds.training.world import World

RECORD = "micro_batch.json"


class Place(Protocol):
    """Where a run takes place, as far as it matters here; `run.Launch` is one."""

    @property
    def machine(self) -> Machine:
        """What one rank has."""

    @property
    def world(self) -> World:
        """This rank among all."""

    @property
    def meeting(self) -> Meeting:
        """Where the ranks wait for rank 0."""

    def say(self, line: str) -> None:
        """Print a line, on rank 0."""


def with_tried_micro_batch(  # noqa: PLR0913 - two of them by name
    resolved: Resolved,
    recipe: Recipe,
    target: Path,
    run_dir: Path,
    *,
    kernels: Kernels,
    packing: DocumentPacking | None,
    launch: Place,
) -> Resolved:
    """The config with the largest micro-batch that real steps say fits; all ranks call it together.

    A launch that finds checkpoints takes what the first one found from the run folder, since another micro-batch would
    sum the gradients in another order.

    Args:
        resolved: The config of the run.
        recipe: Owner of the global batch.
        target: Folder of the target.
        run_dir: The run folder.
        kernels: What the run computes with.
        packing: How it keeps documents apart, which takes memory as well.
        launch: Where it takes place.

    Raises:
        MachineError: If not even the smallest fits.
        RecipeError: Under ZeRO-3.
    """
    if resolved.zero_stage == 3:
        raise RecipeError(
            "--auto-micro-batch does not work with ZeRO-3: DeepSpeed does not give the memory of a trial back",
            allowed="ZeRO-1 or 2",
            action=f"write {MICRO_BATCH} into the DeepSpeed config; inheritune-ds plan says what fits",
        )
    world, per_rank = launch.world, recipe.training.batch_windows // launch.world.size
    found = launch.meeting.by_main(lambda: _recorded(run_dir, per_rank))
    if found:
        launch.say(f"{MICRO_BATCH}: {found} (found by trying, at this run's first launch)")
        return _with_size(resolved, found, per_rank // found)

    def build(size: int, micro_steps: int) -> Engine:
        trial = dict(_with_size(resolved, size, micro_steps).config)
        trial["train_batch_size"] = size * micro_steps * world.size
        return Engine(load_model(target, dtype="float32"), trial, world, kernels, packing)

    def measure(size: int) -> float:
        return measure_peak(
            build, size, accumulation=per_rank // size, seq_len=recipe.training.seq_len, vocab_size=_vocabulary(target)
        )

    limit = smallest(USABLE_RATIO * launch.machine.memory_gib)
    launch.say("trying micro-batches with real steps (--auto-micro-batch)")
    sequence = _sequence_gib(resolved, recipe, world.size)
    size = largest_that_fits(divisors(per_rank), limit, measure, launch.say, sequence_gib=sequence)
    launch.say(f"{MICRO_BATCH}: {size} (the largest that stays below {limit:.1f} GiB a rank)")
    launch.meeting.by_main(lambda: write_json(run_dir / RECORD, {MICRO_BATCH: size, "usable_gib": limit}))
    return _with_size(resolved, size, per_rank // size)


def _recorded(run_dir: Path, per_rank: int) -> int:
    """The size that the first launch of a run with checkpoints found; 0 if there is none that divides the windows."""
    record: Mapping[str, Any] = read_json(run_dir / RECORD) or {}
    size = record.get(MICRO_BATCH, 0)
    begun = newest_step(run_dir / "checkpoints") > 0
    return size if begun and isinstance(size, int) and size > 0 and per_rank % size == 0 else 0


def _sequence_gib(resolved: Resolved, recipe: Recipe, world_size: int) -> float:
    """What one more sequence adds to the backward pass by the plan; 0 for a family that the plan does not know."""
    shape = target_shape(recipe)
    if shape is None:
        return 0.0
    layout = read_layout(resolved.config, seq_len=recipe.training.seq_len, world_size=world_size)
    one, two = (sum(memory(*shape, micro_batch_size=n, accumulation=2, **layout).backward.values()) for n in (1, 2))
    return two - one


def _with_size(resolved: Resolved, size: int, accumulation: int) -> Resolved:
    config = {**resolved.config, MICRO_BATCH: size, "gradient_accumulation_steps": accumulation}
    return replace(resolved, config=config)


def _vocabulary(target: Path) -> int:
    config = read_json(target / "config.json") or {}
    return int(config["vocab_size"])
