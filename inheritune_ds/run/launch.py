"""One launch: machine, ranks, signals, folders."""

from dataclasses import dataclass
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
    """Everything of a launch that is not the experiment."""

    ds_document: dict[str, Any]
    """The user's DeepSpeed JSON."""
    ds_origin: str
    """Its name in messages."""
    machine: Machine
    """The least device of all ranks."""
    world: World
    stop: StopSignal
    meeting: Coordinator
    """Runs work on rank 0 while the other ranks wait."""
    runs_dir: Path
    cache_dir: Path
    auto_micro_batch: bool = False
    """Whether real steps find the micro-batch."""
    max_minutes: float | None = None
    """Time limit of this launch, from its start."""

    def resolve(self, recipe: Recipe) -> Resolved:
        """The DeepSpeed config of a recipe on this machine."""
        return resolve_for(recipe, self.ds_document, self.ds_origin, world_size=self.world.size, machine=self.machine)
