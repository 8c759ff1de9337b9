"""A rank's share of the training state: taken from DeepSpeed's engine, and restored into one.

Only the refresh of half-precision weights after a load communicates, so a refusal of the disk never keeps a rank from
a collective.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from inheritune_ds.checkpoints.fragments import MASTER, MOMENTS, Fragments, key_of
from inheritune_ds.checkpoints.manifest import Checkpoint
from inheritune_ds.checkpoints.reshard import Partition, changes, check_model, partitions, rounding_of, shapes_of
from inheritune_ds.checkpoints.train_state import SavedLayout
from inheritune_ds.errors import CheckpointError

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
    """Why the fragments, then incomplete, could not be copied to host memory."""

    @property
    def bytes(self) -> int:
        """Of all fragments."""
        return sum(value.nbytes for value in self.fragments.values())


class PinnedBuffers:
    """Host memory that all saves share; page-locked for copies from a GPU."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def copy(self, key: str, values: torch.Tensor) -> torch.Tensor:
        """Copy a tensor into the buffer of a key; a copy from a GPU is complete once the device is synchronized."""
        if key not in self._held:
            pinned = values.device.type == "cuda"
            self._held[key] = torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
        return self._held[key].copy_(values, non_blocking=True)


def capture(engine: Any, buffers: PinnedBuffers | None) -> Snapshot:
    """Take this rank's share from a DeepSpeed engine between two steps.

    The tensors are copied to `buffers`, so that training may continue. Without (None), the fragments are the engine's
    own tensors and must be written before the next step.
    """
    inner, found = engine.optimizer.optimizer, Snapshot()
    found.parameters = {name: {"shape": shape, "step": None} for name, shape in shapes_of(engine).items()}
    found.engine = _record(engine)
    try:
        for number, partition in enumerate(partitions(engine)):
            state = inner.state.get(partition.master, {})
            flats = {MASTER: partition.master, **{kind: state[kind] for kind in MOMENTS if kind in state}}
            for kind, flat in flats.items():
                values = flat.detach().view(-1)
                held = values if buffers is None else buffers.copy(f"{number}/{kind}", values)
                for piece in partition.pieces:
                    found.fragments[key_of(piece.name, kind, piece.start)] = held[piece.at : piece.at + piece.numel]
            if state:  # apex keeps the count of updates in the group, and all groups step together
                step = int(state["step"] if "step" in state else inner.param_groups[0]["step"])
                for piece in partition.pieces:
                    found.parameters[piece.name]["step"] = step
        if buffers is not None and torch.cuda.is_available():
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
        _restore_partition(optimizer.optimizer, partition, saved, steps)
    if is_stage_3:
        for number in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)  # noqa: SLF001 - no public way
        optimizer.checkpoint_event_epilogue()
    else:
        # DeepSpeed links the moments to the parameters once; a restored engine has other tensors.
        optimizer._hp_optimizer_states_linked = False  # noqa: SLF001
        if optimizer.optimizer.state:
            optimizer._lazy_init_hp_params_optimizer_state()  # noqa: SLF001
        optimizer.update_lp_params()
    if record["loss_scaler"] is not None and hasattr(optimizer, "loss_scaler"):
        _restore_scaler(optimizer, record["loss_scaler"])
    for counter in COUNTERS:
        setattr(engine, counter, record["counters"][counter])
    # The micro-steps of a step depend on the number of ranks.
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    now = SavedLayout(dist.get_world_size(), engine.zero_optimization_stage(), checkpoint.layout.precision)
    return tuple(changes(checkpoint.layout, now, record["rounding"], rounding_of(engine.config)))


def _restore_partition(inner: Any, partition: Partition, saved: Fragments, steps: Mapping[str, int | None]) -> None:
    """Fill masters and moments in place; create moments that the engine does not have yet."""
    master = partition.master
    _fill(master, partition, saved, MASTER)
    # A partition without pieces, only padding, has the step of all others.
    counts = {steps[piece.name] for piece in partition.pieces} or set(steps.values())
    if len(counts) > 1:
        raise CheckpointError(
            f"the parameters from {partition.pieces[0].name} to {partition.pieces[-1].name} have different "
            f"numbers of updates ({', '.join(sorted(map(str, counts)))}), but share one count in this layout",
            action="resume with the ranks and the ZeRO stage that saved this checkpoint",
        )
    [step] = counts
    if step is None:  # saved before the first update
        inner.state.pop(master, None)
        for group in inner.param_groups:
            group.pop("step", None)
        return
    state = inner.state[master]
    for kind in MOMENTS:
        if kind not in state:
            state[kind] = torch.zeros_like(master.detach())
        _fill(state[kind], partition, saved, kind)
    if type(inner).__module__.startswith("apex."):
        for group in inner.param_groups:
            group["step"] = step
    elif isinstance(inner, torch.optim.AdamW):
        fused = any(group["fused"] or group["capturable"] for group in inner.param_groups)
        state["step"] = torch.tensor(float(step), device=master.device if fused else "cpu")
    else:
        state["step"] = step  # DeepSpeed passes its count to C++


def _fill(flat: torch.Tensor, partition: Partition, saved: Fragments, kind: str) -> None:
    values = flat.detach().view(-1)
    for piece in partition.pieces:
        saved.copy(piece.name, kind, piece.start, values[piece.at : piece.at + piece.numel])


def _restore_scaler(optimizer: Any, record: Mapping[str, Any]) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

    kind = DynamicLossScaler if record["fields"]["dynamic"] else LossScaler
    scaler = kind.__new__(kind)
    vars(scaler).update(record["fields"])
    if kind is DynamicLossScaler:
        scaler.dtype = torch.half
    optimizer.loss_scaler, optimizer.overflow = scaler, record["overflow"]
    optimizer.dynamic_loss_scale = scaler.dynamic


def fill_masters(engine: Any, values: Mapping[str, torch.Tensor]) -> None:
    """Fill this rank's fp32 masters with exact values, since a new engine derives them from rounded weights.

    `values` are whole parameters by name, of any dtype; of mapped files only this rank's pieces are read.
    """
    for partition in partitions(engine):
        flat = partition.master.detach()
        for piece in partition.pieces:
            source = values[piece.name].reshape(-1)[piece.start : piece.start + piece.numel]
            flat[piece.at : piece.at + piece.numel].copy_(source)
