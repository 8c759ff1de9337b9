"""Loading a saved state into an engine of any number of ranks and any ZeRO stage.

ZeRO keeps each parameter's fp32 master and both of Adam's moments in flat partitions, one a rank and group; where a
parameter lies in them depends on the stage and on the number of ranks. A state is loaded by name: every rank maps the
files of all ranks that saved, copies out of them the pieces that it owns now, and hands DeepSpeed the partition that it
would have saved itself. Nothing is converted on the disk, and no rank holds more than its own share (docs/decisions/
0013-resharding-on-load.md).
"""

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from inheritune_ds.checkpoints.shard_reader import SavedFiles
from inheritune_ds.checkpoints.train_state import SavedLayout
from inheritune_ds.errors import CheckpointError

MASTER = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")
_ROUNDING = (
    ("train_micro_batch_size_per_gpu",),
    ("data_types", "grad_accum_dtype"),
    ("bf16", "immediate_grad_update"),
    ("communication_data_type",),
    ("prescale_gradients",),
    ("gradient_predivide_factor",),
)
"""What may change between launches, does not change what is saved, and changes how later steps round."""


@dataclass(frozen=True)
class Piece:
    """A run of one parameter's elements in a flat partition.

    Attributes:
        name: Of the parameter.
        group: Number of the partition's group.
        at: Its first element in the partition.
        start: Its first element in the flattened parameter.
        numel: Elements.
    """

    name: str
    group: int
    at: int
    start: int
    numel: int


def check_convertible(saved: SavedLayout, now: SavedLayout) -> None:
    """Refuse a state that cannot go on as the same experiment.

    Args:
        saved: What it was saved under.
        now: Of this launch.

    Raises:
        CheckpointError: If the precision differs; number of ranks and ZeRO stage may.
    """
    if saved.precision != now.precision:
        raise CheckpointError(
            f"the checkpoint was saved in {saved.precision}, and this launch computes in {now.precision}",
            allowed=f"{saved.precision}; another number of ranks or ZeRO stage is converted by itself",
            action=f"write the DeepSpeed config so that it gives {saved.precision}, or give the run in "
            f"{now.precision} a folder of its own: name=OTHER or --runs-dir DIR",
        )


def load_by_name(engine: Any, folder: Path) -> tuple[str, ...]:
    """Put a saved state into an engine, new or in use; all ranks must call it.

    Args:
        engine: DeepSpeed's.
        folder: DeepSpeed's files, verified.

    Returns:
        A line if the state was dealt out anew, and one on every setting that rounds otherwise than when it was saved.

    Raises:
        CheckpointError: If the files are not a state of this model.
    """
    files = SavedFiles(folder)
    saved = SavedState(files)
    optimizer = engine.optimizer
    is_stage_3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    if is_stage_3:
        optimizer.checkpoint_event_prologue()
        _hand_over(optimizer, _stage_3_state(engine, saved))
        optimizer.checkpoint_event_epilogue()
    else:
        _hand_over(optimizer, _stage_1_state(optimizer, saved))
        # DeepSpeed links the moments to the parameters once, and has just put others in their place.
        optimizer._hp_optimizer_states_linked = False  # noqa: SLF001 - no public way
        if saved.step is not None:
            optimizer._lazy_init_hp_params_optimizer_state()  # noqa: SLF001
        optimizer.update_lp_params()
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, files.model[counter])
    before, now = files.model["ds_config"], engine.config
    return (*_other_layout(files, before, now), *_other_rounding(before, now))


def _hand_over(optimizer: Any, state: dict[str, Any]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):  # one of DeepSpeed's optimizers prints here
        # It takes the entry of its own rank only.
        optimizer.load_state_dict(
            [state] * dist.get_world_size(), load_optimizer_states=True, load_from_fp32_weights=True
        )


def _other_layout(files: SavedFiles, saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    ranks = len(files.optimizer), dist.get_world_size()
    stages = [_at(config, ("zero_optimization", "stage")) for config in (saved, now)]
    if ranks[0] != ranks[1] or stages[0] != stages[1]:
        yield (
            f"the state was saved on {ranks[0]} ranks in ZeRO stage {stages[0]}, and is dealt out anew to {ranks[1]} "
            f"in stage {stages[1]}: losses may differ in their last digits from here on, "
            "with dropout by its other masks"
        )


def _other_rounding(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for path in _ROUNDING:
        before, after = _at(saved, path), _at(now, path)
        if before != after:
            yield (
                f"WARNING: {'.'.join(path)} is {_word(after)}, and was {_word(before)} when the checkpoint was saved: "
                "later steps round otherwise than an uninterrupted run"
            )


def _at(document: Any, path: Sequence[str]) -> Any:
    for key in path:
        document = document.get(key) if isinstance(document, Mapping) else None
    return document


def _word(value: Any) -> str:
    return "DeepSpeed's default" if value is None else str(value)


class SavedState:
    """What all ranks have saved, by parameter.

    Args:
        files: DeepSpeed's.

    Attributes:
        step: Adam's count of updates; None before the first.
        loss_scaling: What fp16 goes on with; empty where there is no loss scale.
    """

    def __init__(self, files: SavedFiles) -> None:
        self._folder = files.folder
        self._ranks = files.optimizer
        first = self._ranks[0]
        self._is_stage_3 = "fp32_flat_groups" in first
        self._pieces: dict[str, list[tuple[int, Piece]]] = {}
        for rank, pieces in enumerate(self._layout(files.model["param_shapes"])):
            for piece in pieces:
                self._pieces.setdefault(piece.name, []).append((rank, piece))
        self.loss_scaling = {key: first[key] for key in ("loss_scaler", "dynamic_loss_scale") if key in first}
        self.step = self._step()

    def _layout(self, shapes: Sequence[Mapping[str, torch.Size]]) -> Iterator[Iterable[Piece]]:
        if self._is_stage_3:
            ranks = len(self._ranks)
            yield from (stage_3_pieces(shapes, rank, ranks) for rank in range(ranks))
            return
        ends: dict[str, int] = {}
        for state in self._ranks:
            yield list(_following(state["param_slice_mappings"], ends))

    def _step(self) -> int | None:
        """Adam's count of updates; None before the first."""
        base = self._base(self._ranks[0])
        if not base["state"]:
            return None
        entry = base["state"][0]
        return int(entry["step"] if "step" in entry else base["param_groups"][0]["step"])

    def _base(self, state: Mapping[str, Any]) -> Any:
        """The wrapped optimizer's own state_dict."""
        return state["optimizer_state_dict" if self._is_stage_3 else "base_optimizer_state"]

    def check_names(self, names: set[str]) -> None:
        """Compare the saved parameters with a model's."""
        other = sorted(names ^ self._pieces.keys())
        if other:
            raise CheckpointError(
                f"{self._folder} holds another model: {len(other)} parameters are on one side only, first {other[0]}",
                allowed=f"the {len(names)} parameters of this run's target",
                action="delete this checkpoint; the same command takes the one before it",
            )

    def fill(self, partition: torch.Tensor, pieces: Iterable[Piece], key: str) -> None:
        """Copy one kind of value into a flat partition.

        Args:
            partition: To be filled.
            pieces: What lies in it.
            key: MASTER or one of MOMENTS.
        """
        for piece in pieces:
            copied = 0
            for rank, source in self._pieces[piece.name]:
                start, end = max(piece.start, source.start), min(piece.start + piece.numel, source.start + source.numel)
                if start < end:
                    values = self._flat(rank, source.group, key)[source.at + start - source.start :][: end - start]
                    partition[piece.at + start - piece.start :][: end - start].copy_(values)
                    copied += end - start
            if copied != piece.numel:
                raise CheckpointError(
                    f"{self._folder}: {piece.name} has another number of elements than in this run's target",
                    action="delete this checkpoint; the same command takes the one before it",
                )

    def _flat(self, rank: int, group: int, key: str) -> torch.Tensor:
        state = self._ranks[rank]
        if key == MASTER:
            flat = state["fp32_flat_groups" if self._is_stage_3 else "single_partition_of_fp32_groups"][group]
        else:
            flat = self._base(state)["state"][group][key]
        return torch.as_tensor(flat).detach().view(-1)


def _following(groups: Iterable[Mapping[str, Any]], ends: dict[str, int]) -> Iterator[Piece]:
    """The pieces of one rank's partition in stages 1 and 2; a parameter goes on where the rank before ended it."""
    for group, addresses in enumerate(groups):
        for name, address in addresses.items():
            start = ends.get(name, 0)
            ends[name] = start + address.numel
            yield Piece(name, group, address.start, start, address.numel)


def stage_3_pieces(shapes: Sequence[Mapping[str, torch.Size]], rank: int, ranks: int) -> Iterator[Piece]:
    """The pieces of one rank's partitions in stage 3, which cuts every parameter into equal shares, the last padded.

    Args:
        shapes: Names and shapes of every group's parameters, in their order.
        rank: Whose.
        ranks: Of how many.

    Source: DeepSpeed 0.19, runtime/zero/partition_parameters.py (`partition`).
    """
    for group, named in enumerate(shapes):
        at = 0
        for name, shape in named.items():
            share = -(-shape.numel() // ranks)
            numel = max(0, min(share, shape.numel() - rank * share))
            yield Piece(name, group, at, rank * share, numel)
            at += share


def _stage_1_state(optimizer: Any, saved: SavedState) -> dict[str, Any]:
    """This rank's state_dict in stages 1 and 2; the masters are filled in place."""
    parameters = optimizer.bf16_groups if hasattr(optimizer, "bf16_groups") else optimizer.bit16_groups
    saved.check_names({optimizer.param_names[p] for group in parameters for p in group})
    pieces = [
        Piece(optimizer.param_names[p], number, hp.start, lp.start, lp.numel)
        for number, group in enumerate(parameters)
        for p in group
        if (held := p._hp_mapping) is not None  # noqa: SLF001
        for hp, lp in [(held.hp_fragment_address, held.lp_fragment_address)]
    ]
    partitions = [group["params"][0] for group in optimizer.optimizer.param_groups]
    moments = _fill(partitions, pieces, optimizer.optimizer, saved)
    # What is not replaced is this engine's own: paddings, alignment, clipping, weight decay.
    state = optimizer.state_dict()
    scaling = saved.loss_scaling if "loss_scaler" in state else {}
    base = _with_moments(state["base_optimizer_state"], moments, optimizer.optimizer, saved)
    return {**state, **scaling, "base_optimizer_state": base}


def _stage_3_state(engine: Any, saved: SavedState) -> dict[str, Any]:
    """This rank's state_dict in stage 3; the masters are filled in place."""
    optimizer, shapes = engine.optimizer, engine._get_zero_param_shapes()  # noqa: SLF001
    saved.check_names({name for group in shapes for name in group})
    pieces = list(stage_3_pieces(shapes, dist.get_rank(), dist.get_world_size()))
    moments = _fill(optimizer.fp32_partitioned_groups_flat, pieces, optimizer.optimizer, saved)
    state = optimizer.state_dict()
    base = _with_moments(state["optimizer_state_dict"], moments, optimizer.optimizer, saved)
    return {**state, **saved.loss_scaling, "optimizer_state_dict": base}


def _fill(
    partitions: Sequence[torch.Tensor], pieces: Sequence[Piece], inner: torch.optim.Optimizer, saved: SavedState
) -> list[dict[str, torch.Tensor]]:
    """Fill masters and moments; a moment that is there already, in an engine in use, takes no second place in memory.

    Returns:
        Every group's moments; empty if the state was saved before the first update.
    """
    filled = []
    for group, partition in enumerate(partitions):
        own = [piece for piece in pieces if piece.group == group]
        saved.fill(partition.data, own, MASTER)
        if saved.step is not None:
            held = inner.state.get(partition, {})
            moments = {key: held[key] if key in held else torch.zeros_like(partition.data) for key in MOMENTS}
            for key, values in moments.items():
                saved.fill(values, own, key)
            filled.append(moments)
    return filled


def _with_moments(
    base: Mapping[str, Any], moments: Sequence[dict[str, torch.Tensor]], inner: Any, saved: SavedState
) -> dict[str, Any]:
    """The wrapped optimizer's state_dict with these moments, and the count of updates where this Adam keeps it."""
    if saved.step is None:
        return {**base, "state": {}}
    if type(inner).__module__.startswith("apex."):
        groups = [{**group, "step": saved.step} for group in base["param_groups"]]
        return {"state": dict(enumerate(moments)), "param_groups": groups}
    # torch's AdamW counts in a tensor, DeepSpeed's in an int that goes to C++; neither takes the other's.
    counts_in_tensor = isinstance(inner, torch.optim.AdamW)
    # The count comes first, as they put it there, so that the next checkpoint is the same file to the last bit.
    entries = [{"step": torch.tensor(float(saved.step)) if counts_in_tensor else saved.step, **own} for own in moments]
    return {**base, "state": dict(enumerate(entries))}
