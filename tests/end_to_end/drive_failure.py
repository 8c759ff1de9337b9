"""Launched by tests: train.py whose rank 1 runs out of memory at step 3 and, as with NCCL, cannot leave its group."""

import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from inheritune_ds.cli import main
from inheritune_ds.training.engine import Engine

train_step, destroy_group = Engine.train_step, dist.destroy_process_group
steps: list[int] = []


def destroy(group: Any = None) -> None:
    """Hang as NCCL does while other ranks are in a collective; gloo's groups do not."""
    if group is None:
        time.sleep(600)
    destroy_group(group)


def failing(engine: Engine, *arguments: object, **options: object) -> object:
    """Train a step as the package does, but on rank 1 only two."""
    steps.append(1)
    if engine.world.rank == 1 and len(steps) == 3:
        dist.__dict__["destroy_process_group"] = destroy
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 is full. Including")
    return train_step(engine, *arguments, **options)  # type: ignore[arg-type]


setattr(Engine, "train_step", failing)  # noqa: B010 - mypy refuses the assignment
if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
