"""Bytes of weights, gradients and optimizer on one rank at the two worst moments of a step.

Read from DeepSpeed 0.19.8 (bf16_optimizer.py, zero/stage_1_and_2.py, zero/stage3.py), with contiguous_gradients (its
default) and fused AdamW, which needs no memory of its own.

ZeRO-1 in bf16 with fp32 accumulation is its BF16_Optimizer: every rank keeps the whole fp32 accumulator, and also the
bf16 gradients unless bf16.immediate_grad_update frees them. The reduction copies the accumulator in the type of
communication, and before that in fp32 if one call has both parameter groups (5e8 elements or less).
Every other ZeRO-1 and 2 keeps gradients in the type of the passes, gathers a rank's share in one buffer, and makes a
flat copy of a parameter group and an fp32 copy of that before its update. ZeRO-2 with fp32 accumulation has the share
in fp32 and copies nothing. A model in fp32 also has masters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from inheritune_ds.config.zero import (
    REDUCE_BUCKET,
    REUSE_DISTANCE,
    ZeroSettings,
    communication_bytes,
    element_bytes,
    uses_bf16_optimizer,
)
from inheritune_ds.plan.page_locked import chunk_layout

WHOLE_REDUCTION = 5 * 10**8
"""Elements that BF16_Optimizer reduces in one call (DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE)."""
_SUB_GROUP = 10**9
"""Parameters that ZeRO-3 updates at once (DeepSpeed's sub_group_size)."""
_ON_DEVICE = ("weights", "communication buffers", "gathered weights")
"""Parts that are on the device while an offloaded engine is built."""


@dataclass(frozen=True)
class Tensors:
    """Elements of a model's parameters.

    Attributes:
        sizes: Per parameter, in the order of the forward pass; without a tied head.
        decayed: Whether weight decay applies; this makes two parameter groups.
    """

    sizes: Sequence[int]
    decayed: Sequence[bool]

    @property
    def total(self) -> int:
        """All elements."""
        return sum(self.sizes)

    @property
    def groups(self) -> tuple[list[int], list[int]]:
        """The sizes of the parameters with and without weight decay."""
        pairs = list(zip(self.sizes, self.decayed, strict=True))
        return [size for size, decays in pairs if decays], [size for size, decays in pairs if not decays]

    @property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(self.sizes)

    @property
    def largest_group(self) -> int:
        """Elements of the larger parameter group."""
        return max(map(sum, self.groups))


@dataclass(frozen=True)
class States:
    """Bytes by part.

    Attributes:
        resident: All the time.
        first: Additional ones when the backward pass starts: gradients of earlier micro-steps, buffers.
        going: Additional ones when it reaches the last block.
        last: Additional ones when it ends.
        update: Additional ones at the worst moment of reduction and update, without the passes.
        host: On the host, per GPU: what is offloaded, and the copy that an async save writes.
        load: While ZeRO-3 builds the engine of a target that is read by partition, instead of all others.
    """

    resident: dict[str, float]
    first: dict[str, float]
    going: dict[str, float]
    last: dict[str, float]
    update: dict[str, float]
    host: float
    load: dict[str, float] = field(default_factory=dict)


def states(tensors: Tensors, layout: ZeroSettings, *, accumulation: int) -> States:
    """Count the bytes for steps of `accumulation` micro-steps."""
    if layout["zero_stage"] == 3:
        found = _stage_3(tensors, layout)
    elif uses_bf16_optimizer(layout):
        found = _bf16_optimizer(tensors, layout, accumulation)
    else:
        found = _stage_1_and_2(tensors, layout, accumulation)
    if layout["offload_optimizer"]:
        found = _offloaded(tensors, layout, found)
    return replace(found, host=found.host + _async_copy(tensors, layout)) if layout.get("async_save") else found


def _async_copy(tensors: Tensors, layout: ZeroSettings) -> int:
    """Bytes of the chunks that hold a rank's masters and moments, each parameter's cut into equal shares."""
    shares = [4 * -(-size // layout["world_size"]) for size in tensors.sizes] * 3
    return chunk_layout({str(number): share for number, share in enumerate(shares)}).bytes


def _optimizer(count: float, ranks: int) -> dict[str, float]:
    return {"fp32 master weights": 4 * count / ranks, "Adam moments": 8 * count / ranks}


def _bf16_optimizer(tensors: Tensors, layout: ZeroSettings, accumulation: int) -> States:
    count, ranks, wire = tensors.total, layout["world_size"], communication_bytes(layout)
    immediate = layout.get("immediate_grad_update", False)
    upcast = 4.0 * tensors.largest
    gradients = {"gradients": 2.0 * (tensors.largest if immediate else count)}
    apart = sum(tensors.groups[0]) > WHOLE_REDUCTION
    copy, joined = (tensors.largest_group, 0) if apart else (count, 4 * count)
    first = gradients if accumulation > 1 and not immediate else {}
    return States(
        resident={"weights": 2.0 * count, "fp32 gradient accumulator": 4.0 * count, **_optimizer(count, ranks)},
        first=first,
        going=first,
        last={**gradients, "copies": upcast},
        update={
            **({} if immediate else gradients),
            "copies": float(joined + (wire * copy if wire != 4 else 0)),
        },
        host=0.0,
    )


def _stage_1_and_2(tensors: Tensors, layout: ZeroSettings, accumulation: int) -> States:
    count, ranks, element = tensors.total, layout["world_size"], element_bytes(layout["precision"])
    separate = layout["accumulate_fp32"] and element == 2
    share, group = count / ranks, tensors.largest_group / ranks
    bucket = layout.get("reduce_bucket_size", REDUCE_BUCKET)
    partitioned = layout["zero_stage"] == 2
    buffers = {"communication buffers": float((2 if layout.get("overlap_comm", False) else 1) * element * bucket)}
    resident = {"weights": float(element * count), **_optimizer(count, ranks)}
    if separate:
        accumulator = {"fp32 gradient accumulator": 4 * share}
        if partitioned:
            # The whole share exists from the first reduction on. Parameters larger than the bucket keep their gradient
            # until the pass ends if the rank owns them.
            pending = element * max(sum(size for size in tensors.sizes if size > bucket) / ranks, tensors.largest)
            last = {"gradients": pending, **accumulator, **buffers}
            first = accumulator if accumulation > 1 else {}
            return States(resident, first, {**accumulator, **buffers}, last, accumulator, 0.0)
        whole = {"fp32 gradient accumulator": 4.0 * count}
        buffers = {"communication buffers": 2 * buffers["communication buffers"]}  # it reduces the accumulators
        both = {"fp32 gradient accumulator": 4.0 * count + 4 * share, **buffers}
        first = whole if accumulation > 1 else {}
        return States(resident, first, first, {**whole, **buffers}, both, 0.0)
    flat_copies = (element * group if element == 2 else 0.0) + 4 * group
    before_update = {"gradients": element * share, "copies": flat_copies}
    if partitioned:
        # Each micro-step allocates the buffer of a rank's share again, when the first gradient is reduced.
        first = {"gradients": element * share} if accumulation > 1 else {}
        going = {"gradients": element * share * (2 if accumulation > 1 else 1), **buffers}
        last = {**going, "gradients": going["gradients"] + element * tensors.largest}
        return States(resident, first, going, last, before_update, 0.0)
    gradients = {"gradients": float(element * count)}
    reducing = {"gradients": element * (count + share), **buffers}
    worst = max(reducing, before_update, key=lambda parts: sum(parts.values()))
    first = {**gradients, **buffers} if accumulation > 1 else {}
    return States(resident, first, first, {**gradients, **buffers}, worst, 0.0)


def _stage_3(tensors: Tensors, layout: ZeroSettings) -> States:
    count, ranks, element = tensors.total, layout["world_size"], element_bytes(layout["precision"])
    share, group = count / ranks, min(tensors.largest_group / ranks, _SUB_GROUP)
    bucket = float(element * layout.get("reduce_bucket_size", REDUCE_BUCKET))
    kept = 4 if layout["accumulate_fp32"] else element
    resident = {
        "weights": element * share,
        "gradients": kept * share,
        "communication buffers": bucket,
        **_optimizer(count, ranks),
    }
    gathered: dict[str, float] = {}
    if ranks > 1 or layout["offload_parameters"]:
        gathered = {"gathered weights": float(element * min(count, kept_gathered(layout) + tensors.largest))}
    # A bucket is sorted by ranks before it is reduced; a larger gradient is a bucket by itself.
    copies = 2.0 * element * tensors.largest + min(bucket, element * count)
    update = {"copies": kept * group + (4 * group if kept != 4 else 0.0)}
    # DeepSpeed makes the masters of each group twice, and gathers every parameter once, to hook its gradient. The load
    # itself takes less: the weights, and one parameter.
    load = {part: size for part, size in resident.items() if part != "Adam moments"} | {"copies": 4 * group}
    if gathered:
        load["gathered weights"] = float(element * tensors.largest)
    host = 0.0
    if layout["offload_parameters"]:
        host = resident.pop("weights")
        del load["weights"]
    return States(resident, gathered, gathered, {**gathered, "copies": copies}, update, host, load)


def kept_gathered(layout: ZeroSettings) -> int:
    """Last parameters of the forward pass that ZeRO-3 keeps: both ways to them are within the reuse distance."""
    return layout.get("max_reuse_distance", REUSE_DISTANCE) // 2


def _offloaded(tensors: Tensors, layout: ZeroSettings, found: States) -> States:
    """Move masters, moments and their fp32 gradients to the host; ZeRO-1 and 2 also a copy of the share there."""
    element, share = element_bytes(layout["precision"]), tensors.total / layout["world_size"]
    resident = dict(found.resident)
    host = found.host + sum(resident.pop(part, 0.0) for part in ("fp32 master weights", "Adam moments"))
    host += 4 * share  # the gradients of the masters
    if layout["zero_stage"] == 3:
        host += resident.pop("gradients")
        load = {part: size for part, size in found.load.items() if part in _ON_DEVICE}
        return replace(found, resident=resident, update={}, host=host, load=load)
    host += element * share
    resident["copies"] = float(element * tensors.largest)
    update = {part: size for part, size in found.update.items() if part != "copies"}
    return States(resident, found.first, found.going, found.last, update, host)
