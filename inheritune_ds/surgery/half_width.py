"""The paper's half-width baseline: every block, with the first half of the heads and of the MLP units.

Source: arXiv 2404.08634v4, appendix D. Hidden size and number of heads are halved, so a head keeps its size.
A tensor of the target is the leading half of the reference's along every halved dimension.
"""

from typing import TYPE_CHECKING

import torch

from inheritune_ds.errors import SurgeryError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gpt_neox", "opt", "olmo", "stablelm", "starcoder2")
"""Families whose tensors are laid out head by head, or concatenate q, k and v as `_SEGMENTS` lists."""
_SEGMENTS = {"attn.c_attn.weight": 3, "attn.c_attn.bias": 3}
"""Tensors of several equal pieces along the last dimension, each halved separately (GPT-2: q, k, v)."""
_HALVED = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "ffn_dim", "n_inner")


def halve_config(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """Copy a config with half the width.

    Raises:
        SurgeryError: If the family is not one of `FAMILIES`, a size is odd, or a setting gives tensors without a half.
    """
    if config.model_type not in FAMILIES:
        raise SurgeryError(
            f"width half: the tensors of a {config.model_type} model cannot be halved head by head",
            allowed=f"one of {', '.join(FAMILIES)}",
        )
    if getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size:
        raise SurgeryError(
            f"width half: word_embed_proj_dim is {config.word_embed_proj_dim}, hidden_size {config.hidden_size}: the "
            "embeddings have another width than the blocks",
            allowed="a reference whose embeddings are as wide as its blocks",
        )
    if config.model_type == "stablelm" and config.qk_layernorm:
        raise SurgeryError(
            "width half: every head has a norm of its own (qk_layernorm is true), which the target's heads would lack",
            allowed="a reference without qk_layernorm",
        )
    values = config.to_dict()
    for name in _HALVED:
        key = config.attribute_map.get(name, name)
        size = values.get(key)
        if not isinstance(size, int):
            continue  # None: derived from another size
        if size % 2:
            raise SurgeryError(f"width half: {key} is {size}, an odd number", allowed="a reference with even sizes")
        values[key] = size // 2
    if "word_embed_proj_dim" in values:
        values["word_embed_proj_dim"] = config.hidden_size // 2
    if "head_dim" in values and values["head_dim"] is None:
        values["head_dim"] = config.hidden_size // config.num_attention_heads
    return type(config).from_dict(values)


def leading_half(tensor: torch.Tensor, shape: tuple[int, ...], name: str) -> torch.Tensor:
    """The leading part of a reference's tensor, of the target's `shape`; `name` is that inside the model.

    Raises a SurgeryError if a size is neither the tensor's nor half of it.
    """
    if tensor.dim() != len(shape) or any(
        size not in (whole, whole / 2) for size, whole in zip(shape, tensor.shape, strict=True)
    ):
        raise SurgeryError(f"width half: {name} has shape {list(tensor.shape)}, the target's is {list(shape)}")
    for ending, pieces in _SEGMENTS.items():
        if name.endswith(ending):
            halves = [piece[..., : shape[-1] // pieces] for piece in tensor.chunk(pieces, dim=-1)]
            tensor = torch.cat(halves, dim=-1)
    for dimension, size in enumerate(shape):
        tensor = tensor.narrow(dimension, 0, size)
    return tensor.contiguous()
