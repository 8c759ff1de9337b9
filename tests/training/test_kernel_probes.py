"""Probes of kernels; stubs replace packages that are not installed."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from inheritune_ds.training import kernel_probes
from inheritune_ds.training.kernel_probes import (
    INSTALL,
    Obstacle,
    attention_obstacle,
    compile_obstacle,
    liger_loss_obstacle,
    liger_obstacle,
    optimizer_obstacle,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def config(family: str = "llama", **values: Any) -> PreTrainedConfig:
    made: PreTrainedConfig = AutoConfig.for_model(family, **values)
    return made


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_passes_its_probe(family: str, dtype: torch.dtype) -> None:
    assert attention_obstacle("sdpa", config(family), CPU, dtype) is None


def uniform(*given: torch.Tensor, **_: object) -> torch.Tensor:
    return given[2].mean(dim=2, keepdim=True) + 0.0 * (given[0] + given[1])


def broken(*_: object, **__: object) -> torch.Tensor:
    raise RuntimeError("no kernel image is available\nmore lines")


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (uniform, "gives wrong values (relative error "),
        (broken, "does not work: RuntimeError: no kernel image is available"),
    ],
)
def test_a_probe_detects_wrong_values_and_exceptions(
    attention: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    found = attention_obstacle("sdpa", config("gpt2"), CPU, torch.float32)
    assert found is not None
    assert found.reason.startswith(reason)
    assert "more lines" not in found.reason


@pytest.mark.parametrize(
    ("version", "family", "dtype", "reason"),
    [
        (2, "llama", torch.float32, "made for bf16 and fp16"),
        (2, "llama", torch.float16, "not installed"),
        (3, "llama", torch.bfloat16, "not installed"),
        (4, "llama", torch.bfloat16, "the GPU is older than compute capability 9.0"),
        (2, "bloom", torch.bfloat16, "not made for bloom models"),
        (3, "gpt2", torch.bfloat16, "made without dropout, and the target's attention has 0.1 of it"),
    ],
)
def test_flash_attention_is_for_some_models_types_and_gpus(
    version: int, family: str, dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    name = f"flash_attention_{version}"
    obstacle = Obstacle(reason, INSTALL[name] if reason == "not installed" else "")
    assert attention_obstacle(name, config(family), GPU, dtype) == obstacle


@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_attention_without_a_deterministic_backward_pass_is_an_obstacle_to_that_mode(
    monkeypatch: pytest.MonkeyPatch, *, deterministic: bool
) -> None:
    from transformers import modeling_flash_attention_utils as utils

    def old(*_: object, causal: bool) -> torch.Tensor:
        raise RuntimeError(f"called with causal={causal}")

    known = {**utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2], "general_availability_check": lambda: True}
    monkeypatch.setitem(utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX, 2, known)
    monkeypatch.setattr(utils, "lazy_import_flash_attention", lambda _: ((old, old, None, None, None), (None, None)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    found = attention_obstacle("flash_attention_2", config(), GPU, torch.bfloat16)
    assert found is not None
    assert ("it has no deterministic backward pass" in found.reason) is deterministic


@pytest.mark.parametrize("kind", ["torch_fused", "torch"])
def test_torch_s_optimizers_pass_their_probe(kind: str) -> None:
    assert optimizer_obstacle(kind, CPU) is None


class Fused(torch.optim.AdamW):
    """A stub of NVIDIA's FusedAdam."""

    def __init__(self, params: Any, *, adam_w_mode: bool, **settings: Any) -> None:
        assert adam_w_mode
        super().__init__(params, **settings)


class Undecayed(Fused):
    """Forgets the decay."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__([{**group, "weight_decay": 0.0} for group in params], **settings)


class PythonOnly:
    """apex built without its extensions."""

    def __init__(self, *_: object, **__: object) -> None:
        raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")


@pytest.mark.parametrize(
    ("fused", "reason"),
    [
        (Fused, None),
        (Undecayed, "gives wrong values"),
        (PythonOnly, "does not work: RuntimeError: apex.optimizers.FusedAdam requires cuda extensions"),
        (None, "not installed (no module apex.optimizers)"),
    ],
)
def test_apex_is_known_by_its_step_and_not_by_its_name(
    fused: type | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    apex = ModuleType("apex")  # PyPI's has no optimizers
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.delitem(sys.modules, "apex.optimizers", raising=False)
    if fused is not None:
        optimizers = ModuleType("apex.optimizers")
        optimizers.FusedAdam = fused  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    found = optimizer_obstacle("apex", CPU)
    assert (found is None) is (reason is None)
    if found is not None:
        assert found.reason.startswith(str(reason))
        assert found.install == INSTALL["apex"]


def test_deepspeed_s_optimizer_is_not_built_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    found = optimizer_obstacle("deepspeed", GPU)
    assert found is not None
    assert found.reason.startswith("no C++ compiler found (/nowhere/c++)")
    assert "CXX" in found.install


def test_missing_liger_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name in [name for name in sys.modules if name.startswith("liger_kernel")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    for found in (liger_obstacle(config(), CPU), liger_loss_obstacle(CPU)):
        assert found is not None
        assert found.reason.startswith("not installed (no module liger_kernel")
        assert found.install == "pip install liger-kernel"


def test_a_family_without_liger_s_kernels_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    def patch_llama(*, rope: bool, rms_norm: bool, fused_linear_cross_entropy: bool) -> None: ...

    def patch_bert(*, layer_norm: bool) -> None: ...

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernel_probes, "_liger_patches", lambda: {"llama": patch_llama, "bert": patch_bert})
    monkeypatch.setattr(kernel_probes, "_liger_norm_error", lambda _: 0.0)
    assert kernel_probes.liger_parts("llama") == ["rms_norm", "rope"]
    assert liger_obstacle(config("llama"), CPU) is None
    assert liger_obstacle(config("gpt2"), CPU) == Obstacle("no kernels for gpt2 models")
    assert liger_obstacle(config("bert"), CPU) == Obstacle("no kernels for bert models")


def test_a_compiler_that_does_not_work_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_probes, "check_toolchain", lambda *_: None)
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    assert compile_obstacle(CPU) is None

    def no_triton(*_: object, **__: object) -> None:
        raise RuntimeError("Cannot find a working triton installation.")

    monkeypatch.setattr(torch, "compile", no_triton)
    for device in (CPU, GPU):
        found = compile_obstacle(device)
        assert found == Obstacle(
            "does not work: RuntimeError: Cannot find a working triton installation.", INSTALL["compile"]
        )
