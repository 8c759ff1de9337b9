"""SDPA with heads padded to a multiple of 8.

With a mask, torch's fused kernels take no other head size (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp,
`check_head_dim_size_mem_efficient` and `check_cudnn_tensor_shapes`). The plain arithmetic that remains keeps the scores
of all pairs of tokens in every block. Zeros behind queries and keys change no score, and zeros behind the values only
the columns that are cut off.

Shapes: B sequences, H heads, T tokens, D head size.
"""

from typing import Any

import torch
from torch.nn import functional

HEAD_MULTIPLE = 8
"""Elements; 16 bytes in half precision."""


def pad_heads() -> None:
    """Let transformers' `sdpa` attention pad the heads, for every model of this process."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("sdpa", padded_sdpa)


def padded_sdpa(  # noqa: PLR0913, PLR0917 - transformers' signature
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' `sdpa_attention_forward` of tensors (B, H, T, D) with padded heads; the output is (B, T, H, D)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    width = value.shape[-1]
    if scaling is None and query.shape[-1] % HEAD_MULTIPLE:
        scaling = query.shape[-1] ** -0.5  # of the true size
    query, key, value = pad_head(query), pad_head(key), pad_head(value)
    given = {"dropout": dropout, "scaling": scaling, **options}
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    return output[..., :width].contiguous(), None


def pad_head(tensor: torch.Tensor) -> torch.Tensor:
    """Append zeros to the last dimension up to a multiple of 8; the tensor itself if it is one."""
    missing = -tensor.shape[-1] % HEAD_MULTIPLE
    return functional.pad(tensor, (0, missing)) if missing else tensor
