"""DeepSpeed's layout of a model on its ranks: the settings for memory and communication, from a resolved config."""

from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypedDict

Precision = Literal["fp32", "bf16", "fp16"]
Recomputation = Literal["none", "selective", "full"]
Loss = Literal["chunked", "plain"]

REDUCE_BUCKET = 5 * 10**8
"""DeepSpeed's own zero_optimization.reduce_bucket_size, in elements."""
REUSE_DISTANCE = 10**9
"""DeepSpeed's own stage3_max_reuse_distance, in parameters."""
PERSISTENCE_THRESHOLD = 10**5
"""DeepSpeed's own stage3_param_persistence_threshold, in elements."""


class ZeroSettings(TypedDict):
    """The layout, as keyword arguments of `plan.memory.memory`."""

    seq_len: int
    zero_stage: int
    world_size: int
    precision: Precision
    accumulate_fp32: bool
    offload_optimizer: bool
    offload_parameters: bool
    activation_checkpointing: NotRequired[Recomputation]
    """Activations that the backward pass recomputes (default: none)."""
    loss: NotRequired[Loss]
    """Whether the logits of all tokens exist at once (plain) or those of a chunk (the default)."""
    masked_attention: NotRequired[bool]
    """Whether attention takes a mask: documents are kept apart without flash attention (default: no)."""
    immediate_grad_update: NotRequired[bool]
    """bf16.immediate_grad_update: half-precision gradients are freed once accumulated (default: no)."""
    overlap_comm: NotRequired[bool]
    """Whether gradients are reduced during the backward pass (default: no)."""
    reduce_bucket_size: NotRequired[int]
    """Elements (default: DeepSpeed's)."""
    max_reuse_distance: NotRequired[int]
    """ZeRO-3 keeps a gathered parameter that is reused within this many parameters (default: DeepSpeed's)."""
    persistence_threshold: NotRequired[int]
    """ZeRO-3 does not shard parameters with at most this many elements (default: DeepSpeed's)."""
    reduce_fp32: NotRequired[bool]
    """communication_data_type fp32 in a half-precision run (default: no, gradients are sent in half precision)."""
    async_save: NotRequired[bool]
    """Whether checkpoints are written from a copy of the state in host memory (default: no)."""


def read_layout(
    ds_config: Mapping[str, Any], *, seq_len: int, world_size: int, documents: bool = False
) -> ZeroSettings:
    """Read the layout from a DeepSpeed config, which must have stage, precision and accumulation type.

    Other keys that are `auto` or missing have DeepSpeed's own values. Chunks are the default of `kernels.loss`, and
    `liger` uses them, too. With `documents` kept apart an `auto` attention counts as one with a mask, which needs more.
    """
    zero, kernels = _given(ds_config["zero_optimization"]), _given(ds_config.get("kernels", {}))
    stage = int(zero["stage"])
    return ZeroSettings(
        seq_len=seq_len,
        zero_stage=stage,
        world_size=world_size,
        precision=precision_of(ds_config),
        accumulate_fp32=ds_config["data_types"]["grad_accum_dtype"] == "fp32",
        offload_optimizer=offload_device(zero, "offload_optimizer") != "none",
        offload_parameters=offload_device(zero, "offload_param") != "none",
        activation_checkpointing=kernels.get("activation_checkpointing", "none"),
        loss="plain" if kernels.get("loss") == "plain" else "chunked",
        masked_attention=documents and not str(kernels.get("attention")).startswith("flash_attention"),
        immediate_grad_update=bool(_given(ds_config.get("bf16", {})).get("immediate_grad_update", False)),
        overlap_comm=bool(zero.get("overlap_comm", stage == 3)),  # DeepSpeed's own default
        reduce_bucket_size=int(zero.get("reduce_bucket_size", REDUCE_BUCKET)),
        max_reuse_distance=int(zero.get("stage3_max_reuse_distance", REUSE_DISTANCE)),
        persistence_threshold=int(zero.get("stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD)),
        reduce_fp32=ds_config.get("communication_data_type") == "fp32",
        async_save=bool(_given(ds_config.get("reliability", {})).get("async_save", False)),
    )


def _given(block: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in block.items() if value not in ("auto", None)}


def precision_of(ds_config: Mapping[str, Any]) -> Precision:
    """Precision of the forward and backward pass in a resolved DeepSpeed config."""
    if ds_config.get("bf16", {}).get("enabled"):
        return "bf16"
    return "fp16" if ds_config.get("fp16", {}).get("enabled") else "fp32"


def offload_device(zero: Mapping[str, Any], key: str) -> str:
    """The device of `offload_optimizer` or `offload_param`: none or cpu."""
    block = zero.get(key)
    device = block.get("device") if isinstance(block, dict) else None
    return "none" if device in ("auto", None) else str(device)


def element_bytes(precision: Precision) -> int:
    """Bytes of one weight in the passes."""
    return 4 if precision == "fp32" else 2


def communication_bytes(layout: ZeroSettings) -> int:
    """Bytes of one gradient on the wire: DeepSpeed's default is the precision of the passes."""
    return 4 if layout.get("reduce_fp32", False) else element_bytes(layout["precision"])


def uses_bf16_optimizer(layout: ZeroSettings) -> bool:
    """Whether DeepSpeed 0.19.8 uses its BF16_Optimizer (engine.py, `_do_optimizer_sanity_check`)."""
    return (
        layout["zero_stage"] == 1
        and layout["precision"] == "bf16"
        and layout["accumulate_fp32"]
        and not layout["offload_optimizer"]
    )
