"""How a process was started: the machine, the ranks, the signals, the folders."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from inheritune_ds.config.deepspeed import Machine, Resolved
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.distributed.coordination import Coordinator
from inheritune_ds.distributed.signals import StopSignal
from inheritune_ds.distributed.world import World
from inheritune_ds.plan.micro_batch import resolve_for


@dataclass(frozen=True)
class Launch:
    """How this process was started: everything that is not the experiment.

    Attributes:
        ds_document: The user's DeepSpeed JSON.
        ds_origin: How to call it in messages.
        machine: What one rank has.
        world: This rank among all.
        stop: Its signals.
        runs_dir: Run folders stand below it.
        cache_dir: Token files stand below it.
        auto_micro_batch: Whether the micro-batch is found by trying.
        max_minutes: How long this launch may take, from its start; None: as long as it needs.
    """

    ds_document: dict[str, Any]
    ds_origin: str
    machine: Machine
    world: World
    stop: StopSignal
    runs_dir: Path
    cache_dir: Path
    auto_micro_batch: bool = False
    max_minutes: float | None = None

    @cached_property
    def meeting(self) -> Coordinator:
        """Where the ranks wait for rank 0."""
        return Coordinator(self.world, self.stop)

    def resolve(self, recipe: Recipe) -> Resolved:
        """The DeepSpeed config of a recipe on this machine."""
        return resolve_for(recipe, self.ds_document, self.ds_origin, world_size=self.world.size, machine=self.machine)
