"""The `kernels` block of a DeepSpeed config, resolved."""

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from inheritune_ds.config.deepspeed import Machine, Resolved
from inheritune_ds.config.kernels import KernelRequest
from inheritune_ds.errors import RecipeError

CPU = Machine(kind="cpu", memory_gib=16.0, bf16=False)
OLD_GPU = Machine(kind="cuda", memory_gib=16.0, bf16=False)
FLAT = {"train_micro_batch_size_per_gpu": 8}
Resolve = Callable[..., Resolved]

AUTO_KERNELS = dict.fromkeys(("attention", "optimizer", "liger", "loss", "compile"), "auto")
AUTO_KERNELS |= {"activation_checkpointing": "none"}


@pytest.mark.parametrize("given", [{}, {"kernels": None}, {"kernels": {}}, {"kernels": {"liger": "auto"}}])
def test_all_kernels_are_written_and_keep_auto(given: dict[str, Any], resolved: Resolve) -> None:
    found = resolved({**FLAT, **given})
    assert found.config["kernels"] == AUTO_KERNELS
    assert found.kernels == KernelRequest()
    assert not [note for note in found.notes if note.startswith("kernels")]


def test_named_kernels_reach_the_request(resolved: Resolve) -> None:
    named = {
        "attention": "flash_attention_3",
        "optimizer": "apex",
        "liger": False,
        "loss": "liger",
        "compile": True,
        "activation_checkpointing": "selective",
    }
    found = resolved({**FLAT, "kernels": named})
    assert found.config["kernels"] == named
    assert found.kernels.model_dump() == named
    with pytest.raises(ValidationError, match="frozen"):
        found.kernels.compile = False


def test_automatic_checkpointing_of_activations_is_none(resolved: Resolve) -> None:
    found = resolved({**FLAT, "kernels": {"activation_checkpointing": "auto"}})
    assert found.kernels.activation_checkpointing == "none"
    assert "kernels.activation_checkpointing: none (auto: it costs a second forward pass)" in found.notes


def test_torch_adam_of_the_optimizer_block_names_torch_s(resolved: Resolve) -> None:
    found = resolved({**FLAT, **TORCH_ADAM})
    assert found.kernels.optimizer == "torch_fused"
    assert "kernels.optimizer: torch_fused (optimizer.params.torch_adam selects torch's)" in found.notes
    assert resolved({**FLAT, **TORCH_ADAM, "kernels": {"optimizer": "torch"}}).kernels.optimizer == "torch"
    assert resolved({**FLAT, **TORCH_ADAM, **OFFLOADED}).kernels.optimizer == "auto"


OFFLOADED = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
BREAKS = "true does not work with stage 3: its hooks gather parameters inside the block and break the graph"
CPU_ADAM = "torch does not work with offload_optimizer: only DeepSpeed's CPU Adam updates a state on the host"
TWO_OWNERS = "apex contradicts optimizer.params.torch_adam, which selects torch's"
AUTO = 'write "auto"'
REMOVE_OFFLOAD = f"{AUTO}, or remove zero_optimization.offload_optimizer"
REMOVE_TORCH_ADAM = "remove optimizer.params.torch_adam"
NO_CPU_KERNEL = "flash_attention_2 has no kernel for a CPU"
HALF = "computes in half precision, this run in fp32"
TORCH_ADAM = {"optimizer": {"params": {"torch_adam": True}}}
REFUSALS: list[tuple[Machine, dict[str, Any], str, str]] = [
    (CPU, {"kernels": {"attention": "flash_attention_2"}}, f"attention: {NO_CPU_KERNEL}", AUTO),
    (OLD_GPU, {"kernels": {"attention": "flash_attention_4"}}, f"attention: flash_attention_4 {HALF}", AUTO),
    (CPU, {"kernels": {"compile": True}, "zero_optimization": {"stage": 3}}, f"compile: {BREAKS}", AUTO),
    (CPU, {"kernels": {"optimizer": "torch"}, **OFFLOADED}, f"optimizer: {CPU_ADAM}", REMOVE_OFFLOAD),
    (OLD_GPU, {"kernels": {"optimizer": "apex"}, **TORCH_ADAM}, f"optimizer: {TWO_OWNERS}", REMOVE_TORCH_ADAM),
]


@pytest.mark.parametrize(("machine", "document", "problem", "action"), REFUSALS)
def test_kernels_that_contradict_another_key_are_refused(
    machine: Machine, document: dict[str, Any], problem: str, action: str, resolved: Resolve
) -> None:
    with pytest.raises(RecipeError) as caught:
        resolved({**FLAT, **document}, machine=machine)
    assert (caught.value.problem, caught.value.action) == (f"ds.json: kernels.{problem}", action)
    assert caught.value.allowed
