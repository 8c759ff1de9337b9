"""Recomputed and compiled blocks give the gradients of plain ones."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from inheritune_ds.training.block_wrapping import ActivationCheckpointing, wrap_blocks
from inheritune_ds.training.document_masks import skip_packing_check
from inheritune_ds.training.loss import attach_loss

CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48
    ),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=16, attn_pdrop=0.1),
}


def gradients(family: str, *, compiled: bool, kept: ActivationCheckpointing, passes: int = 1) -> torch.Tensor:
    skip_packing_check()
    torch.manual_seed(1)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[family]).train()
    wrap_blocks(model, compiled=compiled, activation_checkpointing=kept)
    attach_loss(model, "plain", compiled=False)
    for number in range(passes):
        torch.manual_seed(number)  # the same dropout
        tokens = torch.randint(0, 97, (2, 9))
        model(input_ids=tokens[:, :-1], targets=tokens[:, 1:], use_cache=False)[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kept", ["selective", "full"])
def test_recomputed_blocks_give_the_same_gradients(family: str, kept: ActivationCheckpointing) -> None:
    plain = gradients(family, compiled=False, kept="none")
    assert torch.equal(gradients(family, compiled=False, kept=kept), plain)


def saved_bytes(kept: ActivationCheckpointing) -> int:
    """Bytes saved for the backward pass outside checkpointed regions."""
    torch.manual_seed(1)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS["llama"]).train()
    wrap_blocks(model, compiled=False, activation_checkpointing=kept)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(input_ids=torch.randint(0, 97, (2, 16)), use_cache=False).logits
    del output
    return sum(seen.values())


def test_full_recomputation_keeps_little() -> None:
    assert saved_bytes("full") < 0.5 * saved_bytes("none")


@pytest.fixture
def flash_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Counter[str]]]:
    """Registers an operator by the name that flash-attn gives it, as `flash_attention_2`; counts its calls."""
    libraries: list[Any] = []

    def register(name: str) -> Counter[str]:
        calls: Counter[str] = Counter()
        namespace, operator_name = name.split("::")
        library: Any = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
        libraries.append(library)
        library.define(f"{operator_name}(Tensor q, Tensor k, Tensor v) -> Tensor")

        def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            calls[name] += 1
            return (q @ k.mT).tril().softmax(-1) @ v

        library.impl(operator_name, forward, "CPU")
        operator = getattr(getattr(torch.ops, namespace), operator_name)

        class Flash(torch.autograd.Function):
            """As flash-attn: the operator inside an autograd function."""

            @staticmethod
            def forward(ctx: Any, *given: torch.Tensor) -> torch.Tensor:
                ctx.save_for_backward(*given)
                return operator(*given)  # type: ignore[no-any-return]

            @staticmethod
            def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
                with torch.enable_grad():
                    given = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
                    output = (given[0] @ given[1].mT).tril().softmax(-1) @ given[2]
                return torch.autograd.grad(output, given, gradients[0])

        def attention(_: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *__: Any, **___: Any) -> Any:
            output: torch.Tensor = Flash.apply(q, k, v)  # type: ignore[no-untyped-call]
            return output.transpose(1, 2).contiguous(), None

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", attention)
        return calls

    yield register
    for library in libraries:
        library._destroy()


@pytest.mark.parametrize("kept", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "name",
    ["flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward", "flash_attn_3::_flash_attn_forward"],
)
def test_selective_recomputation_keeps_the_output_of_flash_attention(
    name: str, kept: ActivationCheckpointing, flash_attention: Callable[[str], Counter[str]]
) -> None:
    calls = flash_attention(name)
    gradients("llama", compiled=False, kept=kept)
    blocks = CONFIGS["llama"].num_hidden_layers
    assert calls[name] == blocks * (2 if kept == "full" else 1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's guards
def test_compiled_blocks_share_one_graph_and_are_compiled_once() -> None:
    counters.clear()
    plain = gradients("llama", compiled=False, kept="none", passes=3)
    compiled = gradients("llama", compiled=True, kept="none", passes=3)
    assert float((compiled - plain).norm() / plain.norm()) <= 1e-6
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's guards
def test_blocks_that_differ_by_a_number_are_all_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # graphs without code
    torch._dynamo.reset()
    counters.clear()
    config = GPT2Config(
        vocab_size=17, n_embd=8, n_layer=10, n_head=2, n_positions=8, scale_attn_by_inverse_layer_idx=True
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).train()
    skip_packing_check()
    wrap_blocks(model, compiled=True, activation_checkpointing="none")
    with torch.no_grad():
        model(input_ids=torch.randint(0, 17, (2, 8)), use_cache=False)
    assert counters["stats"]["unique_graphs"] == 10


def test_blocks_are_not_wrapped_by_default() -> None:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS["gpt2"])
    wrap_blocks(model, compiled=False, activation_checkpointing="none")
    assert all("forward" not in vars(block) for block in model.get_submodule("transformer.h").children())
