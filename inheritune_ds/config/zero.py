"""How DeepSpeed lays a model out on its ranks: what decides memory and communication, read out of a resolved config."""

from collections.abc import Mapping
from typing import Any, Literal, TypedDict

Precision = Literal["fp32", "bf16", "fp16"]
Recomputation = Literal["none", "selective", "full"]
Loss = Literal["chunked", "plain"]

REDUCE_BUCKET = 5 * 10**8
"""DeepSpeed's own zero_optimization.reduce_bucket_size, in elements."""
REUSE_DISTANCE = 10**9
"""DeepSpeed's own stage3_max_reuse_distance, in parameters."""
PERSISTENCE_THRESHOLD = 10**5
"""DeepSpeed's own stage3_param_persistence_threshold, in elements."""


class Placement(TypedDict):
    """Where states lie."""

    seq_len: int
    zero_stage: int
    world_size: int
    precision: Precision
    accumulate_fp32: bool
    offload_optimizer: bool
    offload_parameters: bool


class ZeroSettings(Placement, total=False):
    """The keyword arguments that `budget.memory` and its callers share.

    The keys of this class may be left out; they stand for a resolved config that says nothing else.
    """

    activation_checkpointing: Recomputation
    """What of the activations is computed again in the backward pass (default: none)."""
    loss: Loss
    """Whether the logits of all tokens exist at once (plain) or those of a chunk (the default)."""
    immediate_grad_update: bool
    """bf16.immediate_grad_update: half-precision gradients are freed as soon as they are added up (default: no)."""
    overlap_comm: bool
    """Whether gradients are reduced while the backward pass goes on (default: no)."""
    reduce_bucket_size: int
    """Elements (default: DeepSpeed's)."""
    max_reuse_distance: int
    """ZeRO-3 keeps a gathered parameter that is used again within so many parameters (default: DeepSpeed's)."""
    persistence_threshold: int
    """ZeRO-3 does not share parameters of so many elements or less (default: DeepSpeed's)."""
    reduce_fp32: bool
    """communication_data_type fp32 in a half-precision run (default: no, gradients travel in half precision)."""


def read_layout(ds_config: Mapping[str, Any], *, seq_len: int, world_size: int) -> ZeroSettings:
    """Read out of a DeepSpeed config what decides memory; stage, precision and accumulation type must stand in it.

    Any other key that is `auto` or left out has DeepSpeed's own value. `kernels.loss: liger` works in chunks like
    `chunked`, which is also what `auto` takes.
    """
    zero, kernels = _given(ds_config["zero_optimization"]), _given(ds_config.get("kernels", {}))
    bf16 = _given(ds_config.get("bf16", {}))
    precision: Precision = "fp32"
    if bf16.get("enabled"):
        precision = "bf16"
    elif ds_config.get("fp16", {}).get("enabled"):
        precision = "fp16"
    stage = int(zero["stage"])
    return ZeroSettings(
        seq_len=seq_len,
        zero_stage=stage,
        world_size=world_size,
        precision=precision,
        accumulate_fp32=ds_config["data_types"]["grad_accum_dtype"] == "fp32",
        offload_optimizer=_offloads(zero.get("offload_optimizer")),
        offload_parameters=_offloads(zero.get("offload_param")),
        activation_checkpointing=kernels.get("activation_checkpointing", "none"),
        loss="plain" if kernels.get("loss") == "plain" else "chunked",
        immediate_grad_update=bool(bf16.get("immediate_grad_update", False)),
        overlap_comm=bool(zero.get("overlap_comm", stage == 3)),  # DeepSpeed's own default
        reduce_bucket_size=int(zero.get("reduce_bucket_size", REDUCE_BUCKET)),
        max_reuse_distance=int(zero.get("stage3_max_reuse_distance", REUSE_DISTANCE)),
        persistence_threshold=int(zero.get("stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD)),
        reduce_fp32=ds_config.get("communication_data_type") == "fp32",
    )


def _given(block: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in block.items() if value not in ("auto", None)}


def _offloads(block: Mapping[str, Any] | None) -> bool:
    return block is not None and block.get("device") not in (None, "none")


def element_bytes(precision: Precision) -> int:
    """Bytes of one weight as the passes see it."""
    return 4 if precision == "fp32" else 2


def communication_bytes(layout: ZeroSettings) -> int:
    """Bytes of one gradient on the wire: DeepSpeed takes the precision of the passes unless told otherwise."""
    return 4 if layout.get("reduce_fp32", False) else element_bytes(layout["precision"])


def uses_bf16_optimizer(layout: ZeroSettings) -> bool:
    """Whether DeepSpeed 0.19.8 takes its BF16_Optimizer (engine.py, `_do_optimizer_sanity_check`)."""
    return (
        layout["zero_stage"] == 1
        and layout["precision"] == "bf16"
        and layout["accumulate_fp32"]
        and not layout["offload_optimizer"]
    )
