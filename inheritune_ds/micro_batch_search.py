"""`--auto-micro-batch`: try real steps, take the largest micro-batch that fits, and keep to it when the run goes on."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from inheritune_ds.files import read_json, write_json
from inheritune_ds.recipe import Recipe
from inheritune_ds.surgery.reference import load_model
from inheritune_ds.training.ds_config import MICRO_BATCH, Machine, Resolved
from inheritune_ds.training.engine import Engine
from inheritune_ds.training.kernels import Kernels
from inheritune_ds.training.meeting import Meeting
from inheritune_ds.training.micro_batch import USABLE_RATIO, divisors, largest_that_fits, measure_peak
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
    resolved: Resolved, recipe: Recipe, target: Path, run_dir: Path, *, kernels: Kernels, launch: Place
) -> Resolved:
    """The config with the largest micro-batch that real steps say fits; all ranks call it together.

    The first launch writes what it found into the run folder. Later ones take it from there, since another micro-batch
    would sum the gradients in another order.

    Args:
        resolved: The config of the run.
        recipe: Owner of the global batch.
        target: Folder of the target.
        run_dir: The run folder.
        kernels: What the run computes with.
        launch: Where it takes place.

    Raises:
        MachineError: If not even the smallest fits.
    """
    world, per_rank = launch.world, recipe.training.batch_windows // launch.world.size
    found = launch.meeting.by_main(lambda: _recorded(run_dir, per_rank))
    if found:
        launch.say(f"{MICRO_BATCH}: {found} (found by trying, at this run's first launch)")
        return _with_size(resolved, found, per_rank // found)

    def build(size: int, micro_steps: int) -> Engine:
        trial = dict(_with_size(resolved, size, micro_steps).config)
        trial["train_batch_size"] = size * micro_steps * world.size
        return Engine(load_model(target, dtype="float32"), trial, world, kernels)

    def measure(size: int) -> float:
        return measure_peak(
            build, size, accumulation=per_rank // size, seq_len=recipe.training.seq_len, vocab_size=_vocabulary(target)
        )

    limit = USABLE_RATIO * launch.machine.memory_gib
    launch.say("trying micro-batches with real steps (--auto-micro-batch)")
    size = largest_that_fits(divisors(per_rank), limit, measure, launch.say)
    launch.say(f"{MICRO_BATCH}: {size} (the largest tried that stays below {limit:.1f} GiB a rank)")
    launch.meeting.by_main(lambda: _record(run_dir, size, limit))
    return _with_size(resolved, size, per_rank // size)


def _recorded(run_dir: Path, per_rank: int) -> int:
    """The size that an earlier launch of this run found; 0 if there is none that divides the rank's windows."""
    record: Mapping[str, Any] = read_json(run_dir / RECORD) or {}
    size = record.get(MICRO_BATCH, 0)
    return size if isinstance(size, int) and size > 0 and per_rank % size == 0 else 0


def _record(run_dir: Path, size: int, limit_gib: float) -> None:
    write_json(run_dir / RECORD, {MICRO_BATCH: size, "usable_gib": limit_gib})


def _with_size(resolved: Resolved, size: int, accumulation: int) -> Resolved:
    config = {**resolved.config, MICRO_BATCH: size, "gradient_accumulation_steps": accumulation}
    return replace(resolved, config=config)


def _vocabulary(target: Path) -> int:
    config = read_json(target / "config.json") or {}
    return int(config["vocab_size"])
