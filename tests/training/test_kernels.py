"""The ladders of kernels; packages that are not here are stood in for."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.llama import modeling_llama

from inheritune_ds.config.kernels import COMPILE_FLOPS_CPU, COMPILE_MFU, COMPILE_SECONDS_GPU, KernelRequest
from inheritune_ds.errors import MachineError, RecipeError
from inheritune_ds.plan.gpus import GPUS
from inheritune_ds.training import kernels
from inheritune_ds.training.kernel_probes import Obstacle
from inheritune_ds.training.kernels import Kernels, choose_kernels

CPU, GPU = torch.device("cpu"), torch.device("cuda")
Choice = tuple[Kernels, list[str]]


def config(family: str = "llama", **values: Any) -> PreTrainedConfig:
    made: PreTrainedConfig = AutoConfig.for_model(family, **values)
    return made


def choose(device: torch.device = CPU, family: str = "llama", **given: Any) -> Choice:
    facts: dict[str, Any] = {"dtype": torch.bfloat16, "zero_stage": 1, "offload": False, "run_flops": 1e9}
    facts |= {key: given.pop(key) for key in facts if key in given}
    taken, notes = choose_kernels(KernelRequest(**given), config=config(family), device=device, **facts)
    return taken, [note.removeprefix("kernels.") for note in notes]


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the probes find these kernels in order, and every other one missing."""

    def set_to(*names: str) -> None:
        def found(name: str, *_: object) -> Obstacle | None:
            return None if name in names else Obstacle("not installed", f"install {name}")

        monkeypatch.setattr(kernels, "attention_obstacle", found)
        monkeypatch.setattr(kernels, "optimizer_obstacle", found)
        monkeypatch.setattr(kernels, "liger_obstacle", lambda *_: found("liger"))
        monkeypatch.setattr(kernels, "liger_parts", lambda _: ["rms_norm", "rope"])
        monkeypatch.setattr(kernels, "liger_loss_obstacle", lambda *_: found("liger loss"))
        monkeypatch.setattr(kernels, "compile_obstacle", lambda *_: found("compile"))

    return set_to


NOT_ON_A_CPU = "no faster than torch's on a CPU, and compiled first"


def test_a_cpu_takes_what_torch_has() -> None:
    taken, notes = choose()
    assert taken.as_dict() == {
        "attention": "sdpa",
        "optimizer": "torch_fused",
        "liger": False,
        "loss": "chunked",
        "compile": False,
        "activation_checkpointing": "none",
    }
    assert notes == [
        "attention: sdpa (auto: flash_attention_4, flash_attention_3, flash_attention_2: no GPU in use)",
        f"optimizer: torch_fused (auto: apex: no GPU in use; deepspeed: {NOT_ON_A_CPU})",
        "liger: off (auto: no GPU in use)",
        "loss: chunked (auto: full logits never exist)",
        f"compile: off (auto: the run is 1.0e+09 FLOPs, compiling pays from {COMPILE_FLOPS_CPU:.1e} on)",
        "activation_checkpointing: none",
    ]


def test_auto_takes_the_first_that_works(works: Callable[..., None]) -> None:
    works("flash_attention_3", "sdpa", "apex", "torch", "liger")
    taken, notes = choose(GPU, run_flops=None)
    assert (taken.attention, taken.optimizer, taken.liger) == ("flash_attention_3", "apex", True)
    assert notes[:3] == [
        "attention: flash_attention_3 (auto: flash_attention_4: not installed)",
        "optimizer: apex (auto: the fastest)",
        "liger: on (auto: rms_norm, rope of llama)",
    ]
    works("eager", "torch")
    taken, notes = choose(GPU, run_flops=None)
    assert (taken.attention, taken.optimizer, taken.liger) == ("eager", "torch", False)
    assert notes[1] == "optimizer: torch (auto: apex, deepspeed, torch_fused: not installed)"


NAMED: list[tuple[dict[str, Any], str, str]] = [
    ({"attention": "flash_attention_2"}, "kernels.attention: flash_attention_2", "install flash_attention_2"),
    ({"attention": "sdpa"}, "kernels.attention: sdpa", "install sdpa"),
    ({"optimizer": "apex"}, "kernels.optimizer: apex", "install apex"),
    ({"optimizer": "torch_fused"}, "kernels.optimizer: torch_fused", "install torch_fused"),
    ({"liger": True}, "kernels.liger: liger", "install liger"),
    ({"loss": "liger"}, "kernels.loss: liger", "install liger loss"),
    ({"compile": True}, "kernels.compile: torch.compile", "install compile"),
]


@pytest.mark.parametrize(("named", "key", "install"), NAMED, ids=[row[1] for row in NAMED])
def test_a_named_kernel_that_is_missing_is_told_with_the_line_that_installs_it(
    named: dict[str, Any], key: str, install: str, works: Callable[..., None]
) -> None:
    works("eager", "torch")
    with pytest.raises(MachineError) as caught:
        choose(GPU, run_flops=None, **named)
    assert caught.value.problem == f"{key} is named, but it cannot be used: not installed"
    assert caught.value.allowed == '"auto", or one that works here'
    assert caught.value.action == install


@pytest.mark.parametrize(("named", "key"), [(row[0], row[1]) for row in NAMED if "compile" not in row[0]])
def test_a_named_kernel_that_works_is_taken(named: dict[str, Any], key: str, works: Callable[..., None]) -> None:
    works("eager", "torch", "liger loss", *map(str, named.values()), "liger")
    taken, notes = choose(GPU, run_flops=None, **named)
    assert taken.as_dict().items() >= named.items()
    assert [
        note for note in notes if note.startswith(key.partition(" ")[0].removeprefix("kernels.")) and "named" in note
    ]


@pytest.mark.parametrize(
    ("named", "problem"),
    [
        ({"attention": "flash_attention_2"}, "kernels.attention: flash_attention_2 is named, but it cannot be used"),
        ({"optimizer": "apex"}, "kernels.optimizer: apex is named, but it cannot be used"),
        ({"liger": True}, "kernels.liger: liger is named, but it cannot be used"),
        ({"loss": "liger"}, "kernels.loss: liger is named, but it cannot be used"),
    ],
)
def test_what_no_package_helps_with_is_a_mistake_of_the_config(
    named: dict[str, Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RecipeError) as caught:
        choose(**named)
    assert caught.value.problem == f"{problem}: no GPU in use"
    assert caught.value.action == f'write "auto" for {problem.partition(": ")[0]}'


def test_offload_takes_deepspeed_s_cpu_adam() -> None:
    taken, notes = choose(offload=True)
    assert taken.optimizer == "deepspeed_cpu"
    assert "optimizer: deepspeed_cpu (offload_optimizer asks for it)" in notes


LONG = 1e24
PAYS = "it pays in a run of this length"
H200_LEAST = COMPILE_SECONDS_GPU * COMPILE_MFU * GPUS["h200"].peak_bf16_flops


@pytest.mark.parametrize(
    ("device", "given", "note"),
    [
        (CPU, {"run_flops": COMPILE_FLOPS_CPU}, f"on (auto: {PAYS})"),
        (CPU, {"run_flops": LONG, "dtype": torch.float32}, "off (auto: no gain on a CPU but in bf16)"),
        (CPU, {"run_flops": None}, "off (auto: the FLOPs of the run are not known)"),
        (CPU, {"run_flops": LONG, "zero_stage": 3}, "off (auto: hooks of stage 3 inside the block break the graph)"),
        (CPU, {"run_flops": LONG, "compile": False}, "off (named)"),
        (CPU, {"run_flops": None, "compile": True}, "on (named)"),
        (GPU, {"run_flops": 1.01 * H200_LEAST, "dtype": torch.float32}, f"on (auto: {PAYS})"),
        (
            GPU,
            {"run_flops": 0.99 * H200_LEAST},
            f"off (auto: the run is {0.99 * H200_LEAST:.1e} FLOPs, compiling pays from {H200_LEAST:.1e} on)",
        ),
    ],
)
def test_blocks_are_compiled_where_it_pays(
    device: torch.device,
    given: dict[str, Any],
    note: str,
    works: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    works("eager", "torch", "compile", "liger")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    taken, notes = choose(device, **given)
    assert f"compile: {note}" in notes
    assert taken.compile is note.startswith("on")
    if taken.compile:
        assert "liger: off (auto: torch.compile fuses norm, rotary embedding and gate by itself)" in notes


def test_blocks_are_not_compiled_where_the_compiler_does_not_work(works: Callable[..., None]) -> None:
    works("eager", "torch")
    taken, notes = choose(run_flops=LONG)
    assert not taken.compile
    assert "compile: off (auto: not installed)" in notes


def test_a_cpu_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(
        MachineError, match=r"kernels\.compile: torch\.compile is named, but it cannot be used: no C"
    ) as caught:
        choose(compile=True)
    assert "CXX" in caught.value.action


def test_liger_patches_one_model_and_leaves_its_family(monkeypatch: pytest.MonkeyPatch) -> None:
    patching = ModuleType("liger_kernel.transformers.monkey_patch")
    calls = []

    class LigerNorm(nn.Module): ...

    def liger_rotate(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        calls.append("fused")
        return given[:2]

    def patch(*, model: Any, cross_entropy: bool, fused_linear_cross_entropy: bool) -> None:
        assert not cross_entropy
        assert not fused_linear_cross_entropy
        modeling_llama.LlamaRMSNorm = LigerNorm  # type: ignore[assignment,misc]
        modeling_llama.apply_rotary_pos_emb = liger_rotate
        model.patched = True

    patching.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": patch}  # type: ignore[attr-defined]
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, patching.__name__, patching)
    family = vars(modeling_llama).copy()
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    patched, other = (AutoModelForCausalLM.from_config(config(vocab_size=16, **sizes)) for _ in range(2))
    kernels.apply_liger(patched)
    assert patched.patched
    assert vars(modeling_llama) == family
    tokens = torch.arange(4).unsqueeze(0)
    other(input_ids=tokens)
    assert calls == []
    patched(input_ids=tokens)
    assert calls == ["fused", "fused"]
