"""Test whether kernels work on this machine: each probe runs one on a few numbers and checks the result.

An installed package proves nothing: PyPI's `apex` is another project, and an extension may be built for another torch.
"""

import contextlib
import importlib
import inspect
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from inheritune_ds.errors import InherituneError
from inheritune_ds.training.optimizer import build_optimizer
from inheritune_ds.training.toolchain import check_toolchain

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_TOLERANCE = 0.05
"""Relative error: far above rounding in bf16, and below any mistake."""
_PROBE_TOKENS = 32
LIGER_PARTS = ("rms_norm", "rope", "swiglu", "geglu")
INSTALL = {
    "flash_attention_4": "pip install --pre flash-attn-4",
    "flash_attention_3": "git clone https://github.com/Dao-AILab/flash-attention && "
    "pip install --no-build-isolation ./flash-attention/hopper",
    "flash_attention_2": "pip install flash-attn --no-build-isolation",
    "apex": "git clone https://github.com/NVIDIA/apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "
    "pip install --no-build-isolation ./apex (PyPI's apex is another project)",
    "deepspeed": "install the CUDA toolkit (nvcc) of torch's CUDA version: DeepSpeed builds FusedAdam with it",
    "liger": "pip install liger-kernel",
    "compile": "pip install triton (on a GPU), and a C++ compiler: apt-get install g++ python3-dev",
}
"""The command that installs each kernel."""


@dataclass(frozen=True)
class Obstacle:
    """Why a kernel cannot be used."""

    reason: str
    install: str = ""
    """A remedy; empty if there is none on this machine or for this model."""


def attention_obstacle(
    name: str, config: "PreTrainedConfig", device: torch.device, dtype: torch.dtype
) -> Obstacle | None:
    """Test a forward and a backward pass of one of transformers' attentions, with the target's head shape."""
    if name == "eager":
        return None
    unfit = _unfit_attention(name, config, device, dtype)
    return unfit or _tried(lambda: _attention_error(name, config, device, dtype), INSTALL.get(name, ""))


def _unfit_attention(
    name: str, config: "PreTrainedConfig", device: torch.device, dtype: torch.dtype
) -> Obstacle | None:
    """Obstacles that are known without a call: device, type, family, package."""
    from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    family: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if name == "sdpa":
        return None if family._supports_sdpa else Obstacle(f"not made for {config.model_type} models")  # noqa: SLF001
    version = int(name[-1])
    known: dict[str, Any] = FLASH_ATTENTION_COMPATIBILITY_MATRIX.get(version, {})
    named = getattr(family, "_compatible_flash_implementations", None)
    dropout = max(getattr(config, key, 0.0) or 0.0 for key in ("attention_dropout", "attn_pdrop"))
    least = known.get("cuda_min_major_version", 8)
    obstacles = {
        "no GPU in use": device.type != "cuda",
        "made for bf16 and fp16": dtype not in (torch.bfloat16, torch.float16),
        f"not made for {config.model_type} models": not family._supports_flash_attn or (named and name not in named),  # noqa: SLF001
        f"made without dropout, and the target's attention has {dropout} of it": version > 2 and dropout > 0,
        "unknown to the installed transformers": not known,
    }
    found = next((reason for reason, holds in obstacles.items() if holds), None)
    if found is not None:
        return Obstacle(found)
    if torch.cuda.get_device_capability(device)[0] < least:
        return Obstacle(f"the GPU is older than compute capability {least}.0")
    # Without the package transformers would download a kernel from the hub.
    return None if known["general_availability_check"]() else Obstacle("not installed", INSTALL[name])


def _unable_to_build() -> Obstacle | None:
    from torch.utils.cpp_extension import get_default_build_root

    try:
        check_toolchain(os.environ, Path(get_default_build_root()))
    except InherituneError as error:
        return Obstacle(error.problem, error.action)
    return None


def _attention_error(name: str, config: "PreTrainedConfig", device: torch.device, dtype: torch.dtype) -> float:
    """Relative error of the output and the three gradients against plain arithmetic in fp32."""
    from transformers.modeling_flash_attention_utils import lazy_import_flash_attention
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name != "sdpa":
        (_, by_documents, *_), _ = lazy_import_flash_attention(name)
        if torch.are_deterministic_algorithms_enabled():
            assert_deterministic(by_documents)
    groups, width = _head_shape(config)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 2 * groups, _PROBE_TOKENS, width), *[(1, 2, _PROBE_TOKENS, width)] * 2]
    given = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    module = nn.Module()  # with the attributes that transformers' attention functions read
    implementation = SimpleNamespace(_attn_implementation=name)
    vars(module).update(config=implementation, is_causal=True, layer_idx=0, num_key_value_groups=groups)
    output, _ = ALL_ATTENTION_FUNCTIONS[name](module, *given, None, dropout=0.0, scaling=width**-0.5)
    direction = torch.randn(output.shape, generator=generator).to(device)
    found = [output, *torch.autograd.grad((output.float() * direction).sum(), given)]

    exact = [tensor.detach().float().requires_grad_() for tensor in given]
    keys, values = (tensor.repeat_interleave(groups, dim=1) for tensor in exact[1:])
    scores = exact[0] @ keys.mT * width**-0.5
    future = torch.ones(_PROBE_TOKENS, _PROBE_TOKENS, dtype=torch.bool, device=device).triu(1)
    expected = (scores.masked_fill(future, -torch.inf).softmax(-1) @ values).transpose(1, 2)
    wanted = [expected, *torch.autograd.grad((expected * direction).sum(), exact)]
    return max(_relative(one, other) for one, other in zip(found, wanted, strict=True))


def assert_deterministic(attention: Callable[..., Any]) -> None:
    """Raise RuntimeError if a function of flash-attn has no deterministic backward pass (before its version 2.4.1)."""
    if "deterministic" not in inspect.signature(attention).parameters:
        raise RuntimeError("it has no deterministic backward pass")


def _head_shape(config: "PreTrainedConfig") -> tuple[int, int]:
    """Query heads per key head, and a head's width."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):  # in a few families a list with a number for each block
        return 1, 64
    shared = getattr(config, "num_key_value_heads", None)
    groups = heads // shared if isinstance(shared, int) and heads % shared == 0 else 1
    return groups, getattr(config, "head_dim", None) or config.hidden_size // heads


def optimizer_obstacle(kind: str, device: torch.device) -> Obstacle | None:
    """Compare two steps of an AdamW with torch's plain one; DeepSpeed's is compiled on first use."""
    unable = _unable_to_build() if kind == "deepspeed" else None
    return unable or _tried(lambda: _optimizer_error(kind, device), INSTALL.get(kind, ""))


def _optimizer_error(kind: str, device: torch.device) -> float:
    values = torch.linspace(-1.0, 1.0, 64, device=device)
    stepped = []
    for which in (kind, "torch"):
        parameter = nn.Parameter(values.clone())
        groups = [{"params": [parameter], "weight_decay": 0.5}]
        optimizer = build_optimizer(which, groups, lr=0.1, betas=(0.9, 0.95), eps=1e-8)
        assert optimizer is not None
        for _ in range(2):
            parameter.grad = parameter.detach().square() - 0.3
            optimizer.step()
        stepped.append(parameter.detach() - values)
    return _relative(*stepped)


def liger_obstacle(config: "PreTrainedConfig", device: torch.device) -> Obstacle | None:
    """Test whether Liger has modules for a family, and whether its RMSNorm works."""
    unfit = _no_triton_device(device) or _tried(lambda: 0.0 * len(_liger_patches()), INSTALL["liger"])
    if unfit is None and not liger_parts(config.model_type):
        return Obstacle(f"no kernels for {config.model_type} models")
    return unfit or _tried(lambda: _liger_norm_error(device), INSTALL["liger"])


def liger_parts(model_type: str) -> list[str]:
    """The modules of a family that the installed Liger replaces."""
    patch = _liger_patches().get(model_type)
    taken = inspect.signature(patch).parameters if patch is not None else {}
    return [part for part in LIGER_PARTS if part in taken]


def _liger_patches() -> dict[str, Callable[..., None]]:
    patching = importlib.import_module("liger_kernel.transformers.monkey_patch")
    patches: dict[str, Callable[..., None]] = patching.MODEL_TYPE_TO_APPLY_LIGER_FN
    return patches


def _no_triton_device(device: torch.device) -> Obstacle | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return None if device.type == "cuda" or interpreted else Obstacle("no GPU in use")


def _liger_norm_error(device: torch.device) -> float:
    from liger_kernel.transformers import LigerRMSNorm

    norm, plain = LigerRMSNorm(16, eps=1e-6).to(device), nn.RMSNorm(16, eps=1e-6).to(device)
    return _module_error(norm, plain, device)


def _module_error(found: nn.Module, wanted: nn.Module, device: torch.device) -> float:
    results = []
    for module in (found, wanted):
        given = torch.linspace(-1.0, 2.0, 64, device=device).reshape(4, 16).requires_grad_()
        output = module(given)
        output.square().sum().backward()
        assert given.grad is not None
        results.append(torch.cat([output.detach(), given.grad]))
    return _relative(*results)


def liger_loss_obstacle(device: torch.device) -> Obstacle | None:
    """Test Liger's fused linear cross-entropy."""
    return _no_triton_device(device) or _tried(lambda: _liger_loss_error(device), INSTALL["liger"])


def _liger_loss_error(device: torch.device) -> float:
    from inheritune_ds.training.loss import liger_sum

    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 16, generator=generator).to(device) for rows in (8, 32))
    targets = torch.arange(8, device=device)
    results = []
    for fused in (True, False):
        given = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        if fused:
            loss = liger_sum(given[0], given[1], None, targets)
        else:
            loss = functional.cross_entropy(given[0] @ given[1].T, targets, reduction="sum")
        results.append(torch.cat(torch.autograd.grad(loss, given)))
    return _relative(*results)


def compile_obstacle(device: torch.device) -> Obstacle | None:
    """Compile one line of arithmetic and its backward pass."""
    unable = _unable_to_build() if device.type == "cpu" else None
    return unable or _tried(lambda: _compiled_error(device), INSTALL["compile"])


def _compiled_error(device: torch.device) -> float:
    class Gate(nn.Module):
        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return functional.silu(given) * given

    return _module_error(torch.compile(Gate(), dynamic=False), Gate(), device)  # type: ignore[arg-type]


def _tried(error: Callable[[], float], install: str) -> Obstacle | None:
    """Run a probe, without the output of extension builders; any exception means that the kernel does not work."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = error()
    except ImportError as problem:
        missing = problem.name if isinstance(problem, ModuleNotFoundError) else None
        return Obstacle(f"not installed (no module {missing})" if missing else _first_line(problem), install)
    except Exception as problem:  # noqa: BLE001 - see above
        return Obstacle(f"does not work: {_first_line(problem)}", install)
    return None if found < _TOLERANCE else Obstacle(f"gives wrong values (relative error {found:.2g})", install)


def _first_line(problem: Exception) -> str:
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0] if lines else 'no message'}"


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm; infinite where a value is not finite."""
    difference = float((found.detach().float() - wanted.detach().float()).norm() / wanted.detach().float().norm())
    return min(torch.inf, difference)
