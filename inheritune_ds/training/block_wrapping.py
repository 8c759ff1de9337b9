"""Wrap each transformer block in `torch.compile` and activation checkpointing.

Only the block's `forward` is replaced: DeepSpeed's hooks stay outside and cannot break the compiled graph.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch._dynamo import config as dynamo
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from inheritune_ds.surgery.blocks import find_blocks
from inheritune_ds.surgery.config_cut import num_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ActivationCheckpointing = Literal["none", "selective", "full"]

_ATTENTIONS = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
_KEPT = {
    *(f"aten::{name}" for name in ("mm", "addmm", "bmm")),
    *(f"aten::_scaled_dot_product_{attention}" for attention in _ATTENTIONS),
    # As flash-attn 2 (flash_attn/flash_attn_interface.py) and 3 (hopper/flash_attn_interface.py) register them, commit
    # 0251105a of Dao-AILab/flash-attention. Version 4 registers no operator, so it is computed again.
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::_flash_attn_forward",
}
"""Operators whose outputs `selective` keeps: the most expensive ones to recompute."""
_SPARE_GRAPHS = 8
"""For a smaller last batch of validation windows, and other callers of a block."""


def wrap_blocks(model: "PreTrainedModel", *, compiled: bool, activation_checkpointing: ActivationCheckpointing) -> None:
    """Wrap every transformer block of a model in place, before `deepspeed.initialize`.

    Compiled blocks have fixed shapes, and blocks of the same kind share a graph. For the backward pass, `none` keeps
    all activations, `selective` the outputs of matrix products and attention, `full` only the input of each block.

    Raises:
        SurgeryError: If the model's blocks cannot be identified.
    """
    if not compiled and activation_checkpointing == "none":
        return
    found = find_blocks(model, num_blocks(model.config))
    if compiled:
        # Blocks that differ by a number (GPT-2's scaling by the inverse of the index) need a graph each, in training
        # and in validation; beyond its limit dynamo would run the rest uncompiled.
        dynamo.recompile_limit = max(dynamo.recompile_limit, 2 * found.depth + _SPARE_GRAPHS)
    for block in model.get_submodule(found.path).children():
        forward: Callable[..., Any] = block.forward
        if activation_checkpointing != "none":
            how: dict[str, Any] = {"context_fn": _selective_contexts} if activation_checkpointing == "selective" else {}
            forward = partial(checkpoint, forward, use_reentrant=False, **how)
        if compiled:
            forward = torch.compile(forward, dynamic=False)
        block.forward = forward


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]


def _policy(_context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    """By name: flash-attn's operators exist only where it is installed."""
    return CheckpointPolicy.MUST_SAVE if operator.name() in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
