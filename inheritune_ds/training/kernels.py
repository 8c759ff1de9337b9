"""Which kernels a run takes: `auto` is the best that really works here, a named one has to.

Source of the order: faster first as published (flash-attention's own tables, torchtitan#355 and DeepSpeed#8512 for
fused AdamW); what `benchmarks/gpu.py` measures decides where that is wrong.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from inheritune_ds.config.kernels import (
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

_UNKNOWN_PEAK_FLOPS = 150e12
"""Taken for a GPU whose peak is not known: an A6000's."""


@dataclass(frozen=True)
class Kernels:
    """What was taken; no `auto` is left.

    Attributes:
        attention: transformers' `attn_implementation`.
        optimizer: `apex`, `deepspeed`, `torch_fused`, `torch`, or `deepspeed_cpu` under offload.
        liger: Whether Liger's modules replace the model's.
        loss: How head and cross-entropy are computed.
        compile: Whether each block is compiled.
        activation_checkpointing: What is computed again in the backward pass.
    """

    attention: str
    optimizer: str
    liger: bool
    loss: Literal["liger", "chunked", "plain"]
    compile: bool
    activation_checkpointing: Literal["none", "selective", "full"]

    def as_dict(self) -> dict[str, Any]:
        """For a JSON document."""
        return asdict(self)


@dataclass(frozen=True)
class _Situation:
    """What the choice depends on; `choose_kernels` tells each part."""

    config: "PreTrainedConfig"
    device: torch.device
    dtype: torch.dtype
    zero_stage: int
    offload: bool
    run_flops: float | None


def choose_kernels(  # noqa: PLR0913 - one argument for each thing that decides
    request: KernelRequest,
    *,
    config: "PreTrainedConfig",
    device: torch.device,
    dtype: torch.dtype,
    zero_stage: int,
    offload: bool,
    run_flops: float | None,
) -> tuple[Kernels, tuple[str, ...]]:
    """Take for each part the best kernel that works, or the one that was named.

    Args:
        request: The `kernels` block.
        config: The target's.
        device: Where this rank computes.
        dtype: What the forward and backward pass compute in.
        zero_stage: 1, 2 or 3.
        offload: Whether the optimizer's state lies in main memory.
        run_flops: Model FLOPs of the whole run on this rank; None if they are not known.

    Returns:
        The kernels, and a line on each with its reason.

    Raises:
        MachineError: If a named kernel is missing or does not work; the message has the line that installs it.
        RecipeError: If a named kernel is not for this model, device or precision.
    """
    here = _Situation(config, device, dtype, zero_stage, offload, run_flops)
    attention, *notes = _attention(request.attention, here)
    optimizer, note = _optimizer(request.optimizer, here)
    notes.append(note)
    compiled, note = _compile(request.compile, here)
    liger, liger_note = _liger(request.liger, here, compiled=compiled)
    loss, loss_note = _loss(request.loss, here)
    notes += [liger_note, loss_note, note]
    recompute = cast("Any", request.activation_checkpointing)
    notes.append(f"kernels.activation_checkpointing: {recompute}")
    return Kernels(attention, optimizer, liger, cast("Any", loss), compiled, recompute), tuple(notes)


def _attention(wanted: str, here: _Situation) -> tuple[str, str]:
    return _ladder(
        "attention", wanted, ATTENTIONS, lambda name: attention_obstacle(name, here.config, here.device, here.dtype)
    )


def _optimizer(wanted: str, here: _Situation) -> tuple[str, str]:
    if here.offload:
        return OFFLOADED_OPTIMIZER, f"kernels.optimizer: {OFFLOADED_OPTIMIZER} (offload_optimizer asks for it)"

    def obstacle(name: str) -> Obstacle | None:
        if name == "apex" and here.device.type != "cuda":
            return Obstacle("no GPU in use")
        if name == "deepspeed" and here.device.type != "cuda" and wanted == "auto":
            return Obstacle("no faster than torch's on a CPU, and compiled first")
        return optimizer_obstacle(name, here.device)

    return _ladder("optimizer", wanted, OPTIMIZERS, obstacle)


def _ladder(
    part: str, wanted: str, names: tuple[str, ...], obstacle: Callable[[str], Obstacle | None]
) -> tuple[str, str]:
    """Walk down to the first that works, or take the named one."""
    if wanted != "auto":
        found = obstacle(wanted)
        if found is not None:
            raise _unusable(f"kernels.{part}", wanted, found)
        return wanted, f"kernels.{part}: {wanted} (named)"
    passed: dict[str, list[str]] = {}
    for name in names:
        found = obstacle(name)
        if found is None:
            why = "; ".join(f"{', '.join(of)}: {reason}" for reason, of in passed.items()) or "the fastest"
            return name, f"kernels.{part}: {name} (auto: {why})"
        passed.setdefault(found.reason, []).append(name)
    raise AssertionError(f"the last of {names} always works")


def _liger(wanted: bool | str, here: _Situation, *, compiled: bool) -> tuple[bool, str]:  # noqa: FBT001 - JSON's value
    def switch(on: bool, why: str) -> tuple[bool, str]:  # noqa: FBT001
        return on, f"kernels.liger: {'on' if on else 'off'} ({why})"

    if wanted is False:
        return switch(False, "named")
    if wanted == "auto" and compiled:
        return switch(False, "auto: torch.compile fuses norm, rotary embedding and gate by itself")
    obstacle = liger_obstacle(here.config, here.device)
    if obstacle is None:
        parts = ", ".join(liger_parts(here.config.model_type))
        return switch(True, f"{'auto' if wanted == 'auto' else 'named'}: {parts} of {here.config.model_type}")
    if wanted == "auto":
        return switch(False, f"auto: {obstacle.reason}")
    raise _unusable("kernels.liger", "liger", obstacle)


def _loss(wanted: str, here: _Situation) -> tuple[str, str]:
    if wanted == "auto":
        return LOSSES[0], f"kernels.loss: {LOSSES[0]} (auto: full logits never exist)"
    obstacle = liger_loss_obstacle(here.device) if wanted == "liger" else None
    if obstacle is not None:
        raise _unusable("kernels.loss", wanted, obstacle)
    return wanted, f"kernels.loss: {wanted} (named)"


def _compile(wanted: bool | str, here: _Situation) -> tuple[bool, str]:  # noqa: FBT001 - JSON's value
    if wanted == "auto" and (reason := _compiling_does_not_pay(here)):
        return False, f"kernels.compile: off (auto: {reason})"
    if wanted is False:
        return False, "kernels.compile: off (named)"
    obstacle = compile_obstacle(here.device)
    if obstacle is None:
        return True, f"kernels.compile: on ({'auto: it pays in a run of this length' if wanted == 'auto' else 'named'})"
    if wanted == "auto":
        return False, f"kernels.compile: off (auto: {obstacle.reason})"
    raise _unusable("kernels.compile", "torch.compile", obstacle)


def _compiling_does_not_pay(here: _Situation) -> str:
    """Why not to compile; empty if it pays."""
    if here.zero_stage == 3:
        return "hooks of stage 3 inside the block break the graph"
    if here.run_flops is None:
        return "the FLOPs of the run are not known"
    if here.device.type == "cpu":
        if here.dtype != torch.bfloat16:
            return "no gain on a CPU but in bf16"
        least = COMPILE_FLOPS_CPU
    else:
        known = identify(torch.cuda.get_device_name(here.device))
        least = COMPILE_SECONDS_GPU * COMPILE_MFU * (known.peak_bf16_flops if known else _UNKNOWN_PEAK_FLOPS)
    if here.run_flops < least:
        return f"the run is {here.run_flops:.1e} FLOPs, compiling pays from {least:.1e} on"
    return ""


def _unusable(key: str, name: str, obstacle: Obstacle) -> InherituneError:
    problem = f"{key}: {name} is named, but it cannot be used: {obstacle.reason}"
    if obstacle.install:
        return MachineError(problem, allowed='"auto", or one that works here', action=obstacle.install)
    return RecipeError(problem, allowed='"auto", or one that fits', action=f'write "auto" for {key}')


def apply_liger(model: "PreTrainedModel") -> None:
    """Replace a model's norms, gates and rotary embedding by Liger's, in place; its loss stays.

    Liger also puts its classes and functions into the family's module, where every model of this process finds them.
    That is undone. A rotary embedding is a function of that module, so the modules of this model that call it get a
    `forward` of the same code that looks its names up elsewhere.

    Args:
        model: The target, before DeepSpeed has it; `choose_kernels` has found that Liger works for it.
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
