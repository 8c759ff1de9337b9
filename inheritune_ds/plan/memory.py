"""Peak memory of one GPU in GiB (2**30 bytes), and the largest micro-batch that fits.

The peak is at the worst of three moments. In the backward pass there are all activations and the gradients of earlier
micro-steps when it starts, and all gradients when it ends; the worst of it counts. In the update nothing of the passes
remains, but DeepSpeed reduces and copies gradients. While ZeRO-3 is built, there are no moments yet, but copies of the
masters (see `zero_memory`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Unpack, cast

from inheritune_ds.config.model import Shape
from inheritune_ds.config.zero import ZeroSettings, element_bytes, uses_bf16_optimizer
from inheritune_ds.errors import RecipeError
from inheritune_ds.plan.activations import Passes, activation_bytes, loss_bytes, working_bytes
from inheritune_ds.plan.model_size import GIB, tensors
from inheritune_ds.plan.zero_memory import States, states

LOSS_CHUNK_TOKENS = 1024
"""Tokens per chunk of the chunked loss (`training.loss`)."""
_FIXED_MARGIN_GIB = 1.0
"""CUDA context and the workspaces of cuBLAS and NCCL."""
_FRAGMENTATION_RATIO = 0.05
"""Unused blocks of the allocator."""


@dataclass(frozen=True)
class Memory:
    """Memory of one GPU by part, in GiB.

    Attributes:
        backward: Parts in the backward pass.
        update: Parts while gradients are reduced and weights updated.
        load: Parts while ZeRO-3 builds its engine; only the margin in other stages.
        host_gib: On the host, per GPU: what is offloaded, and the copy that an async save writes.
    """

    backward: Mapping[str, float]
    update: Mapping[str, float]
    load: Mapping[str, float]
    host_gib: float

    @property
    def parts(self) -> Mapping[str, float]:
        """The parts of the worst moment."""
        return max(self.backward, self.update, self.load, key=lambda parts: sum(parts.values()))

    @property
    def total_gib(self) -> float:
        """The peak: sum of the parts of the worst moment."""
        return sum(self.parts.values())

    @property
    def tensors_gib(self) -> float:
        """The peak without the margin: the bytes of live tensors."""
        return self.total_gib - self.parts["margin"]


def memory(
    shape: Shape, num_blocks: int, *, micro_batch_size: int, accumulation: int, **layout: Unpack[ZeroSettings]
) -> Memory:
    """Predict the peak memory of one GPU with `micro_batch_size` sequences per rank and micro-step."""
    found = states(tensors(shape, num_blocks), layout, accumulation=accumulation)
    moments = _passes(shape, num_blocks, micro_batch_size * layout["seq_len"], layout, found)
    backward = max(moments, key=lambda parts: sum(parts.values()))
    update = _joined(found.resident, found.update)
    return Memory(_with_margin(backward), _with_margin(update), _with_margin(found.load), found.host / GIB)


def _passes(shape: Shape, num_blocks: int, tokens: int, layout: ZeroSettings, found: States) -> list[dict[str, float]]:
    """Bytes by part when the backward pass starts, when it reaches the last block, and when it ends."""
    passes = Passes(
        tokens,
        layout["seq_len"],
        element_bytes(layout["precision"]),
        layout.get("activation_checkpointing", "none"),
        layout.get("loss", "chunked"),
        layout.get("masked_attention", False),
    )
    kept, working = activation_bytes(shape, num_blocks, passes), working_bytes(shape, passes)
    logits = loss_bytes(shape, passes, chunk_tokens=LOSS_CHUNK_TOKENS)
    start = {"activations": float(kept), "logits and loss": float(logits)}
    last_block = {"activations": float(kept + working)}
    first_block = {"activations": float(activation_bytes(shape, 1, replace(passes, recomputation="none")))}
    moments = ((found.first, start), (found.going, last_block), (found.last, first_block))
    return [_joined(found.resident, gradients, activations) for gradients, activations in moments]


def _joined(*parts: Mapping[str, float]) -> dict[str, float]:
    """Sums by name, in the order of their first appearance."""
    joined: dict[str, float] = {}
    for name, size in ((name, size) for part in parts for name, size in part.items() if size):
        joined[name] = joined.get(name, 0.0) + size
    return joined


def _with_margin(sizes: Mapping[str, float]) -> dict[str, float]:
    """Convert bytes to GiB and add the margin for the device and its allocator."""
    parts = {name: size / GIB for name, size in sizes.items()}
    return {**parts, "margin": _FIXED_MARGIN_GIB + _FRAGMENTATION_RATIO * sum(parts.values())}


def largest_micro_batch(
    shape: Shape, num_blocks: int, *, memory_gib: float, batch_windows: int, **layout: Unpack[ZeroSettings]
) -> int:
    """Find the largest micro-batch that fits and divides a rank's share of `batch_windows` sequences per step.

    Raises:
        RecipeError: When not even one sequence fits, or the ranks cannot share the batch evenly.
    """
    ranks = layout["world_size"]
    if batch_windows % ranks:
        raise RecipeError(
            f"a step of {batch_windows} sequences cannot be shared evenly by {ranks} ranks",
            allowed=f"a multiple of {ranks} sequences",
            action="change training.global_batch_tokens or the number of ranks",
        )
    share = batch_windows // ranks
    for size in range(share, 0, -1):
        if share % size == 0 and _total(shape, num_blocks, size, share // size, layout) <= memory_gib:
            return size
    raise does_not_fit(shape, num_blocks, memory_gib=memory_gib, micro_batch_size=1, accumulation=share, **layout)


def _total(shape: Shape, num_blocks: int, micro_batch_size: int, accumulation: int, layout: ZeroSettings) -> float:
    need = memory(shape, num_blocks, micro_batch_size=micro_batch_size, accumulation=accumulation, **layout)
    return need.total_gib


def does_not_fit(
    shape: Shape,
    num_blocks: int,
    *,
    memory_gib: float,
    micro_batch_size: int,
    accumulation: int,
    **layout: Unpack[ZeroSettings],
) -> RecipeError:
    """The error for a micro-batch that does not fit, with the changes of the DeepSpeed config that would help."""
    need = memory(shape, num_blocks, micro_batch_size=micro_batch_size, accumulation=accumulation, **layout)
    largest = max(need.parts, key=lambda part: need.parts[part])
    share = micro_batch_size * accumulation
    one = micro_batch_size == 1
    return RecipeError(
        f"{'one sequence' if one else f'{micro_batch_size} sequences'} of {layout['seq_len']} tokens "
        f"{'needs' if one else 'need'} {need.total_gib:.1f} GiB, {need.parts[largest]:.1f} GiB of it {largest}, but a "
        f"rank has {memory_gib:.1f} GiB",
        allowed="a model, precision and ZeRO stage that fit",
        action=_advice(
            lambda size, changed: _total(shape, num_blocks, size, share // size, changed) <= memory_gib,
            micro_batch_size,
            share,
            layout,
        ),
    )


_CHANGES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ('kernels.loss "chunked"', {"loss": "chunked"}),
    ("bf16.immediate_grad_update true", {"immediate_grad_update": True}),
    ('kernels.activation_checkpointing "selective"', {"activation_checkpointing": "selective"}),
    ('kernels.activation_checkpointing "full"', {"activation_checkpointing": "full"}),
    ('data_types.grad_accum_dtype "bf16"', {"accumulate_fp32": False}),
    ("ds_configs/zero2.json", {"zero_stage": 2}),
    ("ds_configs/zero3.json", {"zero_stage": 3}),
)
"""Changes of the layout that save memory, the cheapest in time first."""
_OFFLOAD = {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}


def _advice(fits: Callable[[int, ZeroSettings], bool], micro_batch_size: int, share: int, layout: ZeroSettings) -> str:
    """Advice that fits: a smaller micro-batch, or each change that is enough alone, or the first ones together."""
    for size in range(micro_batch_size - 1, 0, -1):
        if share % size == 0 and fits(size, layout):
            return f"set train_micro_batch_size_per_gpu to {size}"
    possible = [(words, change) for words, change in _CHANGES if _can_change(layout, change)]
    alone = [words for words, change in possible if fits(micro_batch_size, _changed(layout, change))]
    if alone:
        return f"use {' or '.join(alone[:3])}"
    together: dict[str, str] = {}
    changed = layout
    for words, change in possible:
        changed = _changed(changed, change)
        together[next(iter(change))] = words  # a later value of the same key replaces the earlier one
        if fits(micro_batch_size, changed):
            return f"use {' and '.join(together.values())}"
    if fits(micro_batch_size, _changed(layout, _OFFLOAD)):
        return "use ds_configs/zero3_offload.json"
    return "use more ranks, or a GPU with more memory"


def ways_to_save(
    shape: Shape, num_blocks: int, *, micro_batch_size: int, accumulation: int, **layout: Unpack[ZeroSettings]
) -> str:
    """The changes of the DeepSpeed config that lower the predicted peak, each with its prediction, the cheapest first.

    For a run that needs more memory than predicted; its arguments are those of `memory`.
    """
    share = micro_batch_size * accumulation
    planned = _total(shape, num_blocks, micro_batch_size, accumulation, layout)
    smaller = next((size for size in range(micro_batch_size - 1, 0, -1) if share % size == 0), None)
    ways: list[tuple[str, float]] = []
    if smaller is not None:
        words = f"train_micro_batch_size_per_gpu {smaller}"
        ways.append((words, _total(shape, num_blocks, smaller, share // smaller, layout)))
    for words, change in (*_CHANGES, ("ds_configs/zero3_offload.json", _OFFLOAD)):
        if _can_change(layout, change):
            changed = _changed(layout, change)
            ways.append((words, _total(shape, num_blocks, micro_batch_size, accumulation, changed)))
    saving = [f"{words} ({gib:.1f} GiB)" for words, gib in ways if gib < planned - 0.05]
    if not saving:
        return f"use more ranks, or a GPU with more memory; the plan is {planned:.1f} GiB, and no setting lowers it"
    return f"the plan is {planned:.1f} GiB; use one or more of: {', '.join(saving)}"


def _changed(layout: ZeroSettings, change: Mapping[str, Any]) -> ZeroSettings:
    return cast(ZeroSettings, {**layout, **change})


def _can_change(layout: ZeroSettings, change: Mapping[str, Any]) -> bool:
    """Whether a change has an effect on this layout."""
    if all({"loss": "chunked", **layout}.get(key) == value for key, value in change.items()):
        return False
    if "accumulate_fp32" in change:
        return layout["precision"] == "bf16"
    if "immediate_grad_update" in change:
        return uses_bf16_optimizer(layout)
    if change is _OFFLOAD:
        return True
    if "zero_stage" in change:
        return bool(change["zero_stage"] > layout["zero_stage"] and layout["world_size"] > 1)
    return True
