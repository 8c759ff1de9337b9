"""How ranks speak of a save, apart from what the training's process group does meanwhile."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from inheritune_ds.training.world import World

Value = TypeVar("Value")


class Circle(Protocol):
    """How ranks speak of a save. Each raises RuntimeError when a rank has gone."""

    def gather(self, value: Value) -> Sequence[Value]:
        """Every rank's value, on every rank."""

    def tell(self, value: Value) -> Value:
        """Rank 0's value, on every rank."""

    def close(self) -> None:
        """Nothing more will be said."""


class _Alone:
    """The circle of one rank."""

    def gather(self, value: Value) -> Sequence[Value]:
        return [value]

    def tell(self, value: Value) -> Value:
        return value

    def close(self) -> None:
        """Nobody was told anything."""


class _GlooCircle:
    """The circle of several: a process group beside the training's, so that a thread may wait in it."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self._size = size
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def gather(self, value: Value) -> Sequence[Value]:
        values: list[Any] = [None] * self._size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def tell(self, value: Value) -> Value:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def close(self) -> None:
        dist.destroy_process_group(self._group)


def make_circle(world: World, timeout_s: float) -> Circle:
    """The circle of this launch; all ranks call it together.

    Args:
        world: This rank among all.
        timeout_s: How long a rank waits for another.
    """
    return _Alone() if world.size == 1 else _GlooCircle(world.size, timeout_s)
