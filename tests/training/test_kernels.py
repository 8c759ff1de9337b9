"""The choice of kernels; stubs replace packages that are not installed."""

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
from inheritune_ds.training.kernels import Kernels, attention_order, choose_kernels

CPU, GPU = torch.device("cpu"), torch.device("cuda")
Choice = tuple[Kernels, list[str]]


def config(family: str = "llama", **values: Any) -> PreTrainedConfig:
    made: PreTrainedConfig = AutoConfig.for_model(family, **values)
    return made


def choose(device: torch.device = CPU, family: str = "llama", **given: Any) -> Choice:
    facts: dict[str, Any] = {
        "dtype": torch.bfloat16,
        "zero_stage": 1,
        "offload": False,
        "run_flops": 1e9,
        "documents": False,
    }
    facts |= {key: given.pop(key) for key in facts if key in given}
    taken, notes = choose_kernels(KernelRequest(**given), config=config(family), device=device, **facts)
    return taken, [note.removeprefix("kernels.") for note in notes]


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the probes accept these kernels, and miss every other one."""

    def set_to(*names: str) -> None:
        def found(name: str, *_: object) -> Obstacle | None:
            return None if name in names else Obstacle("not installed", f"install {name}")

        monkeypatch.setattr(kernels, "attention_obstacle", found)
        monkeypatch.setattr(kernels, "optimizer_obstacle", found)
        monkeypatch.setattr(kernels, "liger_obstacle", lambda *_: found("liger"))
        monkeypatch.setattr(kernels, "liger_parts", lambda _: ["rms_norm", "rope"])
        monkeypatch.setattr(kernels, "liger_loss_obstacle", lambda *_: found("liger loss"))
        monkeypatch.setattr(kernels, "compile_obstacle", lambda *_: found("compile"))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

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
        "deterministic": False,
    }
    assert notes == [
        "attention: sdpa (auto: flash_attention_4, flash_attention_3, flash_attention_2: no GPU in use)",
        f"optimizer: torch_fused (auto: apex: no GPU in use; deepspeed: {NOT_ON_A_CPU})",
        "liger: off (auto: no GPU in use)",
        "loss: chunked (auto: full logits never exist)",
        f"compile: off (auto: the run is 1.0e+09 FLOPs, compiling pays from {COMPILE_FLOPS_CPU:.1e} on)",
        "activation_checkpointing: none",
        "deterministic: off",
    ]


def test_deterministic_kernels_are_reported_and_kept() -> None:
    taken, notes = choose(deterministic=True)
    assert taken.deterministic
    assert notes[-1] == "deterministic: on"


def test_auto_takes_the_first_that_works(works: Callable[..., None]) -> None:
    works("flash_attention_3", "sdpa", "apex", "torch", "liger")
    taken, notes = choose(GPU, run_flops=None)
    assert (taken.attention, taken.optimizer, taken.liger) == ("flash_attention_3", "apex", True)
    assert notes[:3] == [
        "attention: flash_attention_3 (auto: the fastest)",
        "optimizer: apex (auto: the fastest)",
        "liger: on (auto: rms_norm, rope of llama)",
    ]
    works("eager", "torch")
    taken, notes = choose(GPU, run_flops=None)
    assert (taken.attention, taken.optimizer, taken.liger) == ("eager", "torch", False)
    assert notes[1] == "optimizer: torch (auto: apex, deepspeed, torch_fused: not installed)"


FA2, FA3, FA4 = "flash_attention_2", "flash_attention_3", "flash_attention_4"


@pytest.mark.parametrize(
    ("capabilities", "order", "with_documents"),
    [
        ([(8, 0), (8, 6), (8, 9)], (FA2, "sdpa", "eager"), (FA2, "sdpa", "eager")),  # A100, A6000, 4090
        ([(9, 0)], (FA3, "sdpa", FA2, "eager"), (FA3, FA2, "sdpa", "eager")),  # H100, H200
        ([(10, 0), (12, 0)], (FA4, "sdpa", FA2, "eager"), (FA4, FA2, "sdpa", "eager")),  # B200, 5090
    ],
)
def test_each_gpu_has_its_order_of_attentions(
    capabilities: list[tuple[int, int]], order: tuple[str, ...], with_documents: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for capability in capabilities:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert attention_order(GPU, documents=False) == order
        assert attention_order(GPU, documents=True) == with_documents, "SDPA's mask costs all pairs of tokens"


def test_documents_kept_apart_prefer_any_flash_attention(works: Callable[..., None]) -> None:
    works(FA2, "sdpa", "torch")
    assert [choose(GPU, run_flops=None, documents=apart)[0].attention for apart in (False, True)] == ["sdpa", FA2]


def test_flash_attention_4_and_compiled_blocks_are_taken_together_only_by_name(
    works: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    works("flash_attention_4", "sdpa", "torch", "compile")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA B200")
    taken, notes = choose(GPU, run_flops=LONG)
    assert (taken.attention, taken.compile) == ("sdpa", True)
    assert "attention: sdpa (auto: flash_attention_4: not measured in compiled blocks)" in notes
    taken, notes = choose(GPU, run_flops=LONG, attention="flash_attention_4")
    assert (taken.attention, taken.compile) == ("flash_attention_4", False)
    assert "compile: off (auto: flash_attention_4 is not measured in compiled blocks)" in notes
    assert choose(GPU, run_flops=LONG, compile=False)[0].attention == "flash_attention_4"
    taken, _ = choose(GPU, run_flops=LONG, attention="flash_attention_4", compile=True)
    assert (taken.attention, taken.compile) == ("flash_attention_4", True)


NAMED: list[tuple[str, Any, str]] = [
    ("attention", "flash_attention_2", "flash_attention_2"),
    ("optimizer", "apex", "apex"),
    ("liger", True, "liger"),
    ("loss", "liger", "liger"),
    ("compile", True, "torch.compile"),
]


@pytest.mark.parametrize(("part", "value", "name"), NAMED)
def test_a_named_kernel_must_be_installed(part: str, value: Any, name: str, works: Callable[..., None]) -> None:
    package = {"loss": "liger loss", "compile": "compile"}.get(part, name)
    works("eager", "torch")
    with pytest.raises(MachineError) as caught:
        choose(GPU, run_flops=None, **{part: value})
    assert caught.value.problem == f"kernels.{part}: {name} is named, but it cannot be used: not installed"
    assert (caught.value.allowed, caught.value.action) == ('"auto", or one that works here', f"install {package}")
    works("eager", "torch", package)
    taken, notes = choose(GPU, run_flops=None, **{part: value})
    assert taken.as_dict()[part] == value
    assert [note for note in notes if note.startswith(f"{part}: ") and "named" in note]


@pytest.mark.parametrize(("part", "value", "name"), NAMED[:-1])
def test_a_named_kernel_must_fit_the_device(part: str, value: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RecipeError) as caught:
        choose(**{part: value})
    assert caught.value.problem == f"kernels.{part}: {name} is named, but it cannot be used: no GPU in use"
    assert caught.value.action == f'write "auto" for kernels.{part}'


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
        (CPU, {"run_flops": LONG, "dtype": torch.float32}, "off (auto: on a CPU it pays in bf16 only)"),
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
    device: torch.device, given: dict[str, Any], note: str, works: Any, monkeypatch: pytest.MonkeyPatch
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
    with pytest.raises(MachineError, match=r"torch\.compile is named, but it cannot be used: no C") as caught:
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
