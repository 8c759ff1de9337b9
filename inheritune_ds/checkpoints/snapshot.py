"""A rank's share of the training state: taken from DeepSpeed's engine, and restored into one.

Only the refresh of half-precision weights after a load communicates, so a refusal of the disk never keeps a rank from
a collective.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from inheritune_ds.checkpoints.fragments import MASTER, MOMENTS, Fragments, key_of
from inheritune_ds.checkpoints.manifest import Checkpoint
from inheritune_ds.checkpoints.reshard import Partition, changes, check_model, partitions, rounding_of, shapes_of
from inheritune_ds.checkpoints.train_state import SavedLayout
from inheritune_ds.errors import CheckpointError
from inheritune_ds.plan.page_locked import chunk_layout

COUNTERS = ("global_steps", "global_samples", "skipped_steps")


@dataclass
class Snapshot:
    """A rank's share of a checkpoint."""

    fragments: dict[str, torch.Tensor] = field(default_factory=dict)
    """This rank's flat tensors by `key_of`."""
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`shape` of every parameter, and Adam's `step` of those with a fragment on this rank; None before any update."""
    engine: dict[str, Any] = field(default_factory=dict)
    """For the manifest: counters, loss scaler, dtypes, optimizer, rounding."""
    failure: Exception | None = None
    """Why the fragments could not be copied to host memory."""

    @property
    def bytes(self) -> int:
        """Of all fragments."""
        return sum(value.nbytes for value in self.fragments.values())


class PinnedBuffers:
    """Host memory that all saves share; page-locked for copies from a GPU."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def copy(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy flat tensors into the buffers of their keys; from a GPU complete once the device is synchronized."""
        self._held |= _buffers({key: value for key, value in values.items() if key not in self._held})
        return {key: self._held[key].copy_(value, non_blocking=True) for key, value in values.items()}


def _buffers(like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """New buffers of the sizes and types of flat tensors; parts of a few chunks, see `plan.page_locked`."""
    pinned = any(value.device.type == "cuda" for value in like.values())
    layout = chunk_layout({key: value.nbytes for key, value in like.items()})
    chunks = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in layout.sizes]
    return {
        key: chunks[number][first : first + like[key].nbytes].view(like[key].dtype)
        for key, (number, first) in layout.places.items()
    }


def capture(engine: Any, buffers: PinnedBuffers | None) -> Snapshot:
    """Take this rank's share from a DeepSpeed engine between two steps.

    The tensors are copied to `buffers`, so that training may continue. Without (None), the fragments are the engine's
    own tensors and must be written before the next step.
    """
    inner, found = engine.optimizer.optimizer, Snapshot()
    found.parameters = {name: {"shape": shape, "step": None} for name, shape in shapes_of(engine).items()}
    found.engine = _record(engine)
    try:
        for partition in partitions(engine):
            state = inner.state.get(partition.master, {})
            flats = {MASTER: partition.master, **{kind: state[kind] for kind in MOMENTS if kind in state}}
            for kind, flat in flats.items():
                values = flat.detach().view(-1)
                for piece in partition.pieces:
                    found.fragments[key_of(piece.name, kind, piece.start)] = values[piece.at : piece.at + piece.numel]
            if state:  # apex keeps the count of updates in the group
                step = int(state["step"] if "step" in state else partition.group["step"])
                for piece in partition.pieces:
                    found.parameters[piece.name]["step"] = step
        if buffers is not None:
            found.fragments = buffers.copy(found.fragments)
            if torch.cuda.is_available():
                torch.cuda.current_stream().synchronize()
    except (MemoryError, RuntimeError) as error:  # no host memory: raised on all ranks together
        found.failure = error
    return found


def _record(engine: Any) -> dict[str, Any]:
    optimizer = engine.optimizer
    moments = next((state[MOMENTS[0]] for state in optimizer.optimizer.state.values() if state), None)
    scaler, scaling = getattr(optimizer, "loss_scaler", None), None
    if scaler is not None:  # the dtype is that of the weights
        fields = {key: value for key, value in vars(scaler).items() if key != "dtype"}
        scaling = {"fields": fields, "overflow": bool(optimizer.overflow)}
    return {
        "counters": {name: getattr(engine, name) for name in (*COUNTERS, "micro_steps")},
        "loss_scaler": scaling,
        "dtypes": {
            "weights": _dtype(next(engine.module.parameters())),
            "masters": _dtype(partitions(engine)[0].master),
            "moments": None if moments is None else _dtype(moments),
        },
        "optimizer": f"{type(optimizer.optimizer).__module__}.{type(optimizer.optimizer).__qualname__}",
        "rounding": rounding_of(engine.config),
    }


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def restore(engine: Any, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Restore a verified state into DeepSpeed's engine, new or in use, on all ranks; return the log lines of `changes`.

    Raises:
        CheckpointError: If it is not a state of this model.
    """
    optimizer, parameters, record = engine.optimizer, checkpoint.manifest["parameters"], checkpoint.manifest["engine"]
    check_model(checkpoint.path, parameters, shapes_of(engine))
    saved = Fragments(checkpoint.path, checkpoint.layout.world_size)
    is_stage_3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    if is_stage_3:
        optimizer.checkpoint_event_prologue()
    steps = {name: parameter["step"] for name, parameter in parameters.items()}
    for partition in partitions(engine):
        _fill(partition.master, partition, saved, MASTER, {})
        _restore_moments(optimizer.optimizer, partition, saved, steps, {})
    if is_stage_3:
        for number in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)  # noqa: SLF001 - no public way
        optimizer.checkpoint_event_epilogue()
    else:
        _link_moments(optimizer)
        optimizer.update_lp_params()
    if record["loss_scaler"] is not None and hasattr(optimizer, "loss_scaler"):
        _restore_scaler(optimizer, record["loss_scaler"])
    for counter in COUNTERS:
        setattr(engine, counter, record["counters"][counter])
    # The micro-steps of a step depend on the number of ranks.
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    now = SavedLayout(dist.get_world_size(), engine.zero_optimization_stage(), checkpoint.layout.precision)
    return tuple(changes(checkpoint.layout, now, record["rounding"], rounding_of(engine.config)))


def carry(engine: Any, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
    """Give a new engine Adam's moments and number of updates from a verified checkpoint of another model.

    The masters stay. The engine's parameters in `names` must be in groups of their own (`parameter_groups`); all others
    get zero moments and no updates. All ranks must call it together.

    Args:
        engine: DeepSpeed's.
        checkpoint: Of any depth, number of ranks and ZeRO stage.
        names: From the engine's name of a parameter to that in the checkpoint.

    Raises:
        CheckpointError: If the checkpoint lacks a parameter, its shape differs, or it was saved before any update.
    """
    optimizer, saved_parameters = engine.optimizer, checkpoint.manifest["parameters"]
    shapes = shapes_of(engine)
    for name, source in names.items():
        if saved_parameters.get(source, {}).get("shape") != shapes[name] or saved_parameters[source]["step"] is None:
            raise CheckpointError(
                f"{checkpoint.path} has no optimizer state for {name} (there: {source}, shape {shapes[name]})",
                allowed="a checkpoint of the model that the target was cut from, after its first update",
                action="start with a fresh optimizer state",
            )
    saved = Fragments(checkpoint.path, checkpoint.layout.world_size)
    steps = {name: saved_parameters[names[name]]["step"] if name in names else 0 for name in shapes}
    for partition in partitions(engine):
        _restore_moments(optimizer.optimizer, partition, saved, steps, {name: names.get(name) for name in shapes})
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        _link_moments(optimizer)


def _link_moments(optimizer: Any) -> None:
    """Link the moments to the parameters again: DeepSpeed does it once, and an engine with other state has others."""
    optimizer._hp_optimizer_states_linked = False  # noqa: SLF001
    if optimizer.optimizer.state:
        optimizer._lazy_init_hp_params_optimizer_state()  # noqa: SLF001


def _restore_moments(
    inner: Any,
    partition: Partition,
    saved: Fragments,
    steps: Mapping[str, int | None],
    sources: Mapping[str, str | None],
) -> None:
    """Fill moments in place, or create them, with the numbers of updates in `steps`."""
    master = partition.master
    # A partition without pieces is only padding, where every count gives the same.
    counts = {steps[piece.name] for piece in partition.pieces} or {next(iter(steps.values()))}
    if len(counts) > 1:
        raise CheckpointError(
            f"the parameters from {partition.pieces[0].name} to {partition.pieces[-1].name} have different "
            f"numbers of updates ({', '.join(sorted(map(str, counts)))}), but share one count in this layout",
            action="resume with the ranks and the ZeRO stage that saved this checkpoint",
        )
    [step] = counts
    if step is None:  # saved before the first update
        inner.state.pop(master, None)
        partition.group.pop("step", None)
        return
    state = inner.state[master]
    for kind in MOMENTS:
        if kind not in state:
            state[kind] = torch.zeros_like(master.detach())
        _fill(state[kind], partition, saved, kind, sources)
    if type(inner).__module__.startswith("apex."):
        partition.group["step"] = step
    elif isinstance(inner, torch.optim.AdamW):
        fused = any(group["fused"] or group["capturable"] for group in inner.param_groups)
        state["step"] = torch.tensor(float(step), device=master.device if fused else "cpu")
    else:
        state["step"] = step  # DeepSpeed passes its count to C++


def _fill(
    flat: torch.Tensor, partition: Partition, saved: Fragments, kind: str, sources: Mapping[str, str | None]
) -> None:
    """Copy the pieces of a partition; `sources` has other names of parameters in the files, None for zeros."""
    values = flat.detach().view(-1)
    for piece in partition.pieces:
        own = values[piece.at : piece.at + piece.numel]
        source = sources.get(piece.name, piece.name)
        if source is None:
            own.zero_()
        else:
            saved.copy(source, kind, piece.start, own)


def _restore_scaler(optimizer: Any, record: Mapping[str, Any]) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

    kind = DynamicLossScaler if record["fields"]["dynamic"] else LossScaler
    scaler = kind.__new__(kind)
    vars(scaler).update(record["fields"])
    if kind is DynamicLossScaler:
        scaler.dtype = torch.half
    optimizer.loss_scaler, optimizer.overflow = scaler, record["overflow"]
    optimizer.dynamic_loss_scale = scaler.dynamic


def fill_masters(engine: Any, values: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Fill this rank's fp32 masters with exact values, since a new engine derives them from rounded weights.

    `values` are names and whole parameters, of any dtype; of mapped files only this rank's pieces are read.
    """
    own = {piece.name: (partition.master, piece) for partition in partitions(engine) for piece in partition.pieces}
    for name, whole in values:
        if name in own:
            master, piece = own[name]
            source = whole.reshape(-1)[piece.start : piece.start + piece.numel]
            master.detach()[piece.at : piece.at + piece.numel].copy_(source)
