"""Positions of every parameter's elements in this rank's flat partitions, and the effects of another layout.

ZeRO keeps each parameter's fp32 master and both of Adam's moments in flat partitions, one per rank and group; the
position of a parameter depends on the stage and on the number of ranks. Saving names the pieces by parameter, loading
finds them by name, so a state of any layout loads into any other (docs/decisions/0016-own-fragments.md).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from inheritune_ds.checkpoints.train_state import SavedLayout
from inheritune_ds.errors import CheckpointError

Shapes = Mapping[str, Sequence[int]]
_ROUNDING = (
    ("train_micro_batch_size_per_gpu",),
    ("data_types", "grad_accum_dtype"),
    ("communication_data_type",),
    ("prescale_gradients",),
    ("gradient_predivide_factor",),
)
"""Settings that may change between launches and change the rounding of later steps only."""


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of one parameter in a flat partition."""

    name: str
    at: int
    """First element in the partition."""
    start: int
    """First element in the flattened parameter."""
    numel: int


@dataclass(frozen=True)
class Partition:
    """This rank's share of one group of parameters."""

    master: torch.Tensor
    """Flat fp32 masters of the optimizer; padding may follow the pieces or separate them."""
    pieces: tuple[Piece, ...]
    group: dict[str, Any]
    """The optimizer's group, which several partitions of stage 3 may share."""


def partitions(engine: Any) -> list[Partition]:
    """The partitions that this rank owns, of a DeepSpeed engine in ZeRO stage 1, 2 or 3."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        rank, ranks = dist.get_rank(), dist.get_world_size()
        groups = engine._get_zero_param_shapes()  # noqa: SLF001 - no public way
        return [
            Partition(
                master,
                tuple(stage_3_pieces(shapes, rank, ranks)),
                optimizer.optimizer.param_groups[optimizer.sub_group_to_group_id[number]],
            )
            for number, (master, shapes) in enumerate(zip(optimizer.fp32_partitioned_groups_flat, groups, strict=True))
        ]
    parameters = optimizer.bf16_groups if hasattr(optimizer, "bf16_groups") else optimizer.bit16_groups
    found = []
    for group, named in zip(optimizer.optimizer.param_groups, parameters, strict=True):
        held = [(optimizer.param_names[p], p._hp_mapping) for p in named if p._hp_mapping is not None]  # noqa: SLF001
        pieces = (
            Piece(name, link.hp_fragment_address.start, link.lp_fragment_address.start, link.lp_fragment_address.numel)
            for name, link in held
        )
        found.append(Partition(group["params"][0], tuple(pieces), group))
    return found


def stage_3_pieces(shapes: Mapping[str, torch.Size], rank: int, ranks: int) -> Iterator[Piece]:
    """The pieces of one rank's partition in stage 3, which cuts every parameter into equal shares, the last padded.

    Source: DeepSpeed 0.19, runtime/zero/partition_parameters.py (`partition`).
    """
    at = 0
    for name, shape in shapes.items():
        share = -(-shape.numel() // ranks)
        numel = min(share, shape.numel() - rank * share)
        if numel > 0:
            yield Piece(name, at, rank * share, numel)
        at += share


def shapes_of(engine: Any) -> dict[str, list[int]]:
    """The shapes of all trained parameters by name; the same on all ranks."""
    groups = engine._get_zero_param_shapes()  # noqa: SLF001 - no public way
    return {name: list(shape) for group in groups for name, shape in group.items()}


def rounding_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a DeepSpeed config that change the rounding of steps."""
    found = {}
    for path in _ROUNDING:
        value: Any = config
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        found[".".join(path)] = value
    return found


def check_convertible(saved: SavedLayout, now: SavedLayout) -> None:
    """Raise a CheckpointError if the precision of a state differs; its number of ranks and ZeRO stage may."""
    if saved.precision != now.precision:
        raise CheckpointError(
            f"the checkpoint was saved in {saved.precision}, and this launch computes in {now.precision}",
            allowed=f"{saved.precision}; the state is resharded to another number of ranks or ZeRO stage",
            action=f"set {saved.precision} in the DeepSpeed config, or train in {now.precision} in another run folder: "
            "name=OTHER or --runs-dir DIR",
        )


def check_model(checkpoint: Path, saved: Mapping[str, Mapping[str, Any]], now: Shapes) -> None:
    """Raise a CheckpointError for a state of another model, with the first parameter that differs in name or shape."""
    other = sorted(name for name in saved.keys() | now.keys() if saved.get(name, {}).get("shape") != now.get(name))
    if other:
        raise CheckpointError(
            f"{checkpoint} holds another model: {len(other)} parameters differ, first {other[0]}",
            allowed=f"the {len(now)} parameters of this run's target, in their shapes",
            action="delete this checkpoint, then rerun the same command to resume from the one before",
        )


def changes(
    saved: SavedLayout, now: SavedLayout, saved_rounding: Mapping[str, Any], rounding: Mapping[str, Any]
) -> Iterator[str]:
    """A line if the state is resharded, and one for every changed setting of `rounding_of`."""
    if (saved.world_size, saved.zero_stage) != (now.world_size, now.zero_stage):
        yield (
            f"the state was saved on {saved.world_size} ranks in ZeRO stage {saved.zero_stage}, and is resharded to "
            f"{now.world_size} in stage {now.zero_stage}: losses may differ in their last digits from here on, "
            "and by more with dropout, whose masks change"
        )
    for setting, after in rounding.items():
        if saved_rounding[setting] != after:
            yield (
                f"WARNING: {setting} is {_word(after)}, and was {_word(saved_rounding[setting])} when the checkpoint "
                "was saved: later steps round differently from an uninterrupted run"
            )


def _word(value: Any) -> str:
    return "DeepSpeed's default" if value is None else str(value)
