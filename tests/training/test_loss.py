"""The chunked loss against the plain one and fp64: values, gradients, ignored targets, families without it."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedModel,
)

from inheritune_ds.training import loss as loss_module
from inheritune_ds.training.loss import IGNORED, LossKind, attach_loss

SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, intermediate_size=48, max_position_embeddings=16),
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=16, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0
    ),
    "phi": PhiConfig(**SIZES, intermediate_size=48, max_position_embeddings=16),  # a head with a bias
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last of them shorter, in tiny models."""
    monkeypatch.setattr(loss_module, "LOSS_CHUNK_TOKENS", 7)


def build(family: str) -> PreTrainedModel:
    torch.manual_seed(3)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[family])
    model.train()
    return model


def windows(padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    tokens = torch.randint(0, 97, (4, 11))
    targets = tokens[:, 1:].clone()
    for row in range(4):
        targets[row, 10 - padding * row :] = IGNORED
    return tokens[:, :-1], targets


def gradients(model: PreTrainedModel, kind: LossKind, *, factor: float, padding: int) -> tuple[float, torch.Tensor]:
    assert attach_loss(model, kind, compiled=False) == (kind, "")
    inputs, targets = windows(padding)
    scaled, total = model(input_ids=inputs, targets=targets, factor=factor, use_cache=False)
    assert not total.requires_grad
    scaled.backward()
    flat = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])
    return float(total), flat


def exact(family: str, *, factor: float, padding: int) -> tuple[float, torch.Tensor]:
    """Loss and gradients in fp64 of the same weights."""
    model = build(family).double()
    inputs, targets = windows(padding)
    logits = model(input_ids=inputs, use_cache=False).logits
    total = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    (total * factor).backward()  # type: ignore[no-untyped-call]
    return float(total.detach()), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("kind", ["chunked", "plain"])
def test_loss_and_gradients_of_a_model_are_those_of_fp64(kind: LossKind, family: str, padding: int) -> None:
    total, found = gradients(build(family), kind, factor=3.0 / 40.0, padding=padding)
    true_total, true = exact(family, factor=3.0 / 40.0, padding=padding)
    assert total == pytest.approx(true_total, rel=1e-6)
    assert float((found - true).norm() / true.norm()) <= 1e-6


def head_gradients(kind: str, dtype: torch.dtype, factor: float) -> list[torch.Tensor]:
    """Gradients of hidden states, weight and bias of one head; `exact` is fp64 on the same rounded values."""
    torch.manual_seed(7)
    given = [torch.randn(40, 64), torch.randn(509, 64) / 8.0, torch.randn(509) / 8.0]
    leaves = [tensor.to(dtype).to(torch.float64 if kind == "exact" else dtype).requires_grad_() for tensor in given]
    targets = torch.randint(0, 509, (40,))
    targets[::9] = IGNORED
    if kind == "chunked":
        cross_entropy: Any = loss_module._ChunkedCrossEntropy
        total = cross_entropy.apply(*leaves, targets, factor, loss_module._chunk_gradients)[0]
    else:
        logits = functional.linear(*leaves)
        logits = logits if kind == "exact" else logits.float()
        total = functional.cross_entropy(logits, targets, reduction="sum") * factor
    total.backward()
    return [leaf.grad.double() for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("factor", [1.0 / 32.0, 3.0 / 49.0])
@pytest.mark.parametrize(
    ("dtype", "bar"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)], ids=str
)
def test_head_gradients_are_those_of_fp64(dtype: torch.dtype, bar: float, factor: float) -> None:
    true, chunked, plain = (head_gradients(kind, dtype, factor) for kind in ("exact", "chunked", "plain"))
    for right, found, beside in zip(true, chunked, plain, strict=True):
        error = float((found - right).norm() / right.norm())
        assert error <= bar
        # Each chunk's share of the head's gradient is rounded before the sum; here a chunk has only 7 tokens.
        assert error <= 1.5 * float((beside - right).norm() / right.norm())


@pytest.mark.parametrize("kind", ["chunked", "plain"])
def test_without_gradients_every_token_has_its_loss(kind: LossKind) -> None:
    model = build("llama")
    inputs, targets = windows(2)
    with torch.no_grad():
        logits = model(input_ids=inputs, use_cache=False).logits
        true = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        attach_loss(model, kind, compiled=False)
        found = model(input_ids=inputs, targets=targets, use_cache=False)
    assert found.dtype == torch.float32
    assert torch.allclose(found.flatten(), true, atol=1e-6)
    assert (found[3, 4:] == 0.0).all()


def test_without_targets_the_model_answers_as_before() -> None:
    model = build("llama")
    inputs, _ = windows()
    before = model(input_ids=inputs, use_cache=False).logits
    attach_loss(model, "chunked", compiled=False)
    assert torch.equal(model(input_ids=inputs, use_cache=False).logits, before)


def test_full_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    real = functional.linear

    def watched(given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight.shape[0] == SIZES["vocab_size"]:
            rows.append(given.numel() // given.shape[-1])
        return real(given, weight, bias)

    model = build("llama")
    attach_loss(model, "chunked", compiled=False)
    monkeypatch.setattr(functional, "linear", watched)
    inputs, targets = windows()
    model(input_ids=inputs, targets=targets, use_cache=False)[0].backward()
    with torch.no_grad():
        model(input_ids=inputs, targets=targets, use_cache=False)
    assert sum(rows) == 2 * targets.numel()
    assert max(rows) == 7


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's guards
def test_other_numbers_of_targets_do_not_compile_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # graphs without code
    torch._dynamo.reset()
    counters.clear()
    model, plain = build("llama"), build("llama")
    attach_loss(model, "chunked", compiled=True)
    attach_loss(plain, "chunked", compiled=False)
    for count in range(40, 28, -1):  # beyond dynamo's limit of 8 graphs
        inputs, targets = windows()
        targets.view(-1)[count:] = IGNORED
        for given in (model, plain):
            given(input_ids=inputs, targets=targets, factor=1.0 / count, use_cache=False)[0].backward()
        assert counters["stats"]["unique_graphs"] == 2, "whole chunks, and the shorter last one"
    for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert found.grad is not None
        assert wanted.grad is not None
        assert torch.equal(found.grad, wanted.grad)


def test_frozen_head_takes_no_gradient() -> None:
    model = build("llama")
    attach_loss(model, "chunked", compiled=False)
    head = model.get_output_embeddings()
    head.weight.requires_grad_(requires_grad=False)
    inputs, targets = windows()
    model(input_ids=inputs, targets=targets, use_cache=False)[0].backward()
    assert head.weight.grad is None
    assert all(p.grad is not None for p in model.base_model.parameters())


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SIZES, intermediate_size=48, head_dim=8, num_key_value_heads=4, final_logit_softcapping=5.0),
        GraniteConfig(**SIZES, intermediate_size=48, logits_scaling=4.0),
    ],
    ids=["capped", "scaled"],
)
def test_changed_logits_take_the_plain_loss_with_a_reason(config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    other = copy.deepcopy(model)
    reason = f"the logits of a {config.model_type} model are more than its head's output"
    assert attach_loss(model, "chunked", compiled=False) == ("plain", reason)
    inputs, targets = windows()
    _, total = model(input_ids=inputs, targets=targets, use_cache=False)
    logits = other(input_ids=inputs, use_cache=False).logits
    wanted = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
    assert float(total) == pytest.approx(float(wanted.detach()), rel=1e-6)
