"""Select the kernels of a run: `auto` is the best that works on this machine, a named one must work.

Source of the order: fastest first as published (ATTENTION_ORDER; torchtitan#355 and DeepSpeed#8512 for fused AdamW),
corrected by the measurements of `benchmarks/gpu.py`.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from inheritune_ds.config.kernels import (
    ATTENTION_ORDER,
    ATTENTIONS,
    COMPILE_FLOPS_CPU,
    COMPILE_MFU,
    COMPILE_SECONDS_GPU,
    LOSSES,
    OFFLOADED_OPTIMIZER,
    OPTIMIZERS,
    KernelRequest,
)
from inheritune_ds.errors import InherituneError, MachineError, RecipeError
from inheritune_ds.plan.gpus import identify
from inheritune_ds.training.kernel_probes import (
    Obstacle,
    attention_obstacle,
    compile_obstacle,
    liger_loss_obstacle,
    liger_obstacle,
    liger_parts,
    optimizer_obstacle,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

OnOff = bool | str
"""JSON's true and false, or `auto`."""
_UNCOMPILED = "flash_attention_4"
"""It registers no operator, so that it would break the graph of a compiled block."""
_UNKNOWN_PEAK_FLOPS = 150e12
"""An A6000's, for a GPU whose peak is unknown."""


@dataclass(frozen=True)
class Kernels:
    """The kernels of a run; no `auto` is left."""

    attention: str
    """transformers' `attn_implementation`."""
    optimizer: str
    """One of `OPTIMIZERS`, or `deepspeed_cpu` under offload."""
    liger: bool
    loss: Literal["liger", "chunked", "plain"]
    compile: bool
    activation_checkpointing: Literal["none", "selective", "full"]
    deterministic: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For a JSON document."""
        return asdict(self)


def choose_kernels(  # noqa: PLR0913 - one argument for each fact that decides
    request: KernelRequest,
    *,
    config: "PreTrainedConfig",
    device: torch.device,
    dtype: torch.dtype,
    zero_stage: int,
    offload: bool,
    run_flops: float | None,
    documents: bool = False,
) -> tuple[Kernels, tuple[str, ...]]:
    """Select for each part the best kernel that works, or the one that the config names.

    `dtype` is the type of the forward and backward pass. `run_flops` are the model FLOPs of the whole run on this rank,
    None if unknown. `documents` inside a window are kept apart.

    Returns:
        The kernels, and a log line on each with its reason.

    Raises:
        MachineError: If a named kernel is missing or does not work; the message has the command that installs it.
        RecipeError: If a named kernel is not made for this model, device or precision.
    """
    against = _why_not_compile(request, device, dtype, zero_stage, run_flops) if request.compile == "auto" else ""
    compiled, why = _switch("compile", "torch.compile", request.compile, against, lambda: compile_obstacle(device))

    def obstacle(name: str) -> Obstacle | None:
        if name == _UNCOMPILED and compiled and request.attention == "auto":
            return Obstacle("not measured in compiled blocks")
        return attention_obstacle(name, config, device, dtype)

    order = attention_order(device, documents=documents)
    attention, attention_note = _first_that_works("attention", request.attention, order, obstacle)
    optimizer, optimizer_note = _optimizer(request.optimizer, device, offload=offload)
    length = ": it pays in a run of this length" if compiled and request.compile == "auto" else ""
    liger, liger_why = _liger(request.liger, config, device, compiled=compiled)
    loss, loss_note = _loss(request.loss, device)
    recompute = cast("Any", request.activation_checkpointing)
    notes = (
        attention_note,
        optimizer_note,
        f"kernels.liger: {'on' if liger else 'off'} ({liger_why})",
        loss_note,
        f"kernels.compile: {'on' if compiled else 'off'} ({why}{length})",
        f"kernels.activation_checkpointing: {recompute}",
        f"kernels.deterministic: {'on' if request.deterministic else 'off'}",
    )
    return Kernels(attention, optimizer, liger, cast("Any", loss), compiled, recompute, request.deterministic), notes


def attention_order(device: torch.device, *, documents: bool) -> tuple[str, ...]:
    """The attentions that `auto` tries on a device, best first."""
    if device.type != "cuda":
        return ATTENTIONS
    order = ATTENTION_ORDER.get(min(torch.cuda.get_device_capability(device)[0], max(ATTENTION_ORDER)), ATTENTIONS)
    # SDPA's mask of documents costs all pairs of a window's tokens; flash attention computes those of each document.
    return tuple(sorted(order, key=lambda name: not name.startswith("flash_attention"))) if documents else order


def _optimizer(wanted: str, device: torch.device, *, offload: bool) -> tuple[str, str]:
    if offload:
        return OFFLOADED_OPTIMIZER, f"kernels.optimizer: {OFFLOADED_OPTIMIZER} (offload_optimizer asks for it)"

    def obstacle(name: str) -> Obstacle | None:
        if name == "apex" and device.type != "cuda":
            return Obstacle("no GPU in use")
        if name == "deepspeed" and device.type != "cuda" and wanted == "auto":
            return Obstacle("no faster than torch's on a CPU, and compiled first")
        return optimizer_obstacle(name, device)

    return _first_that_works("optimizer", wanted, OPTIMIZERS, obstacle)


def _first_that_works(
    part: str, wanted: str, names: tuple[str, ...], obstacle: Callable[[str], Obstacle | None]
) -> tuple[str, str]:
    """Select the first of the names that works, or check the named one; returns a log line, too."""
    if wanted != "auto":
        found = obstacle(wanted)
        if found is not None:
            raise _unusable(part, wanted, found)
        return wanted, f"kernels.{part}: {wanted} (named)"
    passed: dict[str, list[str]] = {}
    for name in names:
        found = obstacle(name)
        if found is None:
            why = "; ".join(f"{', '.join(of)}: {reason}" for reason, of in passed.items()) or "the fastest"
            return name, f"kernels.{part}: {name} (auto: {why})"
        passed.setdefault(found.reason, []).append(name)
    raise AssertionError(f"the last of {names} always works")


def _switch(
    part: str,
    name: str,
    wanted: OnOff,
    against: str,
    probe: Callable[[], Obstacle | None],
) -> tuple[bool, str]:
    """Decide whether a kernel is on, and why; `against` is a reason that decides without the probe."""
    if wanted is False:
        return False, "named"
    obstacle = Obstacle(against) if against else probe()
    if obstacle is None:
        return True, "auto" if wanted == "auto" else "named"
    if wanted == "auto":
        return False, f"auto: {obstacle.reason}"
    raise _unusable(part, name, obstacle)


def _liger(
    wanted: OnOff,
    config: "PreTrainedConfig",
    device: torch.device,
    *,
    compiled: bool,
) -> tuple[bool, str]:
    fused = wanted == "auto" and compiled
    against = "torch.compile fuses norm, rotary embedding and gate by itself" if fused else ""
    on, why = _switch("liger", "liger", wanted, against, lambda: liger_obstacle(config, device))
    return on, f"{why}: {', '.join(liger_parts(config.model_type))} of {config.model_type}" if on else why


def _loss(wanted: str, device: torch.device) -> tuple[str, str]:
    if wanted == "auto":
        return LOSSES[0], f"kernels.loss: {LOSSES[0]} (auto: full logits never exist)"
    obstacle = liger_loss_obstacle(device) if wanted == "liger" else None
    if obstacle is not None:
        raise _unusable("loss", wanted, obstacle)
    return wanted, f"kernels.loss: {wanted} (named)"


def _why_not_compile(
    request: KernelRequest, device: torch.device, dtype: torch.dtype, zero_stage: int, run_flops: float | None
) -> str:
    """Why compiling does not pay; empty if it does."""
    if request.attention == _UNCOMPILED:
        return f"{_UNCOMPILED} is not measured in compiled blocks"
    if zero_stage == 3:
        return "hooks of stage 3 inside the block break the graph"
    if run_flops is None:
        return "the FLOPs of the run are not known"
    if device.type == "cpu":
        if dtype != torch.bfloat16:
            return "on a CPU it pays in bf16 only"
        least = COMPILE_FLOPS_CPU
    else:
        known = identify(torch.cuda.get_device_name(device))
        least = COMPILE_SECONDS_GPU * COMPILE_MFU * (known.peak_bf16_flops if known else _UNKNOWN_PEAK_FLOPS)
    return f"the run is {run_flops:.1e} FLOPs, compiling pays from {least:.1e} on" if run_flops < least else ""


def _unusable(part: str, name: str, obstacle: Obstacle) -> InherituneError:
    key = f"kernels.{part}"
    problem = f"{key}: {name} is named, but it cannot be used: {obstacle.reason}"
    if obstacle.install:
        return MachineError(problem, allowed='"auto", or one that works here', action=obstacle.install)
    return RecipeError(problem, allowed='"auto", or one that fits', action=f'write "auto" for {key}')


def apply_liger(model: "PreTrainedModel") -> None:
    """Replace a model's norms, gates and rotary embedding by Liger's, in place, but not its loss.

    Liger also replaces classes and functions of the family's module, for every model of this process. That is undone.
    The rotary embedding is a function of that module, so this model's modules that call it get a `forward` of the same
    code with other globals.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    family = sys.modules[type(model).__module__]
    before = vars(family).copy()
    MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type](
        model=model, cross_entropy=False, fused_linear_cross_entropy=False
    )
    new = {name: vars(family)[name] for name, value in before.items() if vars(family)[name] is not value}
    for name in new:
        setattr(family, name, before[name])
    functions = {name: value for name, value in new.items() if not inspect.isclass(value)}
    names = {**before, **functions}
    del names["__name__"]  # by which torch.compile would look the names up in the module
    for module in model.modules():
        own = getattr(module.forward, "__func__", None)
        if not inspect.isfunction(own) or own.__globals__ is not vars(family):
            continue
        if functions.keys() & {*own.__code__.co_names}:
            bound = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
            bound.__kwdefaults__ = own.__kwdefaults__
            module.forward = MethodType(bound, module)
