"""Padded heads: the values and gradients of plain arithmetic, in the shapes that fused kernels take.

Shapes: B sequences, H heads, T tokens, D head size.
"""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from inheritune_ds.training.padded_attention import pad_head, pad_heads, padded_sdpa

B, H, T = 2, 4, 12
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def given(head: int, keys: int = H, value_head: int | None = None) -> Tensors:
    """Query, key and value that take gradients."""
    torch.manual_seed(0)
    query, key = torch.randn(B, H, T, head), torch.randn(B, keys, T, head)
    return query.requires_grad_(), key.requires_grad_(), torch.randn(B, keys, T, value_head or head).requires_grad_()


def attention_module(keys: int) -> nn.Module:
    module = nn.Module()  # with the attributes that transformers reads
    vars(module).update(is_causal=True, num_key_value_groups=H // keys)
    return module


def apart() -> torch.Tensor:
    """The additive mask (1, 1, T, T) of two documents."""
    document = torch.arange(T) // 7
    seen = (document[:, None] == document[None, :]).tril()
    return torch.zeros(1, 1, T, T).masked_fill(~seen, torch.finfo(torch.float32).min)


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    keys, values = (tensor.repeat_interleave(H // k.shape[1], dim=1) for tensor in (k, v))
    return ((q @ keys.mT * scale + mask).softmax(-1) @ values).transpose(1, 2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keys", [H, 2])
@pytest.mark.parametrize(("head", "value_head"), [(100, 100), (20, 20), (3, 3), (20, 12), (16, 12)])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_padded_heads_give_plain_attention(
    head: int, value_head: int, keys: int, scaling: float | None, *, masked: bool
) -> None:
    causal = torch.zeros(T, T).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    tensors = given(head, keys, value_head)
    mask = apart() if masked else None
    found, _ = padded_sdpa(attention_module(keys), *tensors, mask, scaling=scaling)
    wanted = plain(*tensors, apart() if masked else causal, head**-0.5 if scaling is None else scaling)
    assert found.shape == (B, T, H, value_head)
    assert found.is_contiguous()
    direction = torch.randn_like(wanted)
    pairs = [(found.detach(), wanted.detach())]
    pairs += zip(*(torch.autograd.grad((out * direction).sum(), tensors) for out in (found, wanted)), strict=True)
    assert max(float((one - other).norm() / other.norm()) for one, other in pairs) < 2e-6


@pytest.mark.parametrize("mask", [None, apart()])
def test_heads_of_a_multiple_of_8_are_left_alone(mask: torch.Tensor | None) -> None:
    tensors = given(16)
    assert all(pad_head(tensor) is tensor for tensor in tensors)
    for scaling in (None, 0.3):
        found, wanted = (
            function(attention_module(H), *tensors, mask, scaling=scaling)[0]
            for function in (padded_sdpa, sdpa_attention_forward)
        )
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("head", [100, 26, 4])
def test_fused_kernels_get_heads_of_a_multiple_of_8(head: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conditions of torch's sdp_utils.cpp on the last dimension, which only a GPU can ask for."""
    seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    real: Any = torch.nn.functional.scaled_dot_product_attention

    def watched(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.extend((tuple(tensor.shape), tensor.stride()) for tensor in tensors)
        return real(*tensors, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", sdpa_attention_forward)
    pad_heads()
    sizes = {"vocab_size": 17, "hidden_size": 2 * head, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", **sizes, intermediate_size=8, bos_token_id=None, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model(input_ids=torch.arange(6)[None], use_cache=False)
    assert len(seen) == 3
    for shape, stride in seen:
        assert shape[-1] == head + -head % 8
        assert stride[-1] == 1
        assert all(step % 8 == 0 for step in stride[:-1])
