"""AdamW: its parameter groups and implementations.

Matrices decay; norms, biases and embeddings (including a tied head) do not.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into a decayed and an undecayed group.

    A parameter decays if it has two or more dimensions and belongs to no embedding module.

    Returns:
        Two groups with `params`, `weight_decay` (0 in the second), and `names` (dotted, in the model's order).

    Source: nanoGPT's configure_optimizers and the authors' GPT-2 script exclude vectors; excluding the embeddings, too,
    follows facts of the paper's code (decay on 2-D Linear weights only).
    """
    embeddings = (module for module in model.modules() if isinstance(module, torch.nn.Embedding))
    embedded = {id(parameter) for module in embeddings for parameter in module.parameters()}
    groups: list[dict[str, Any]] = [{"params": [], "names": [], "weight_decay": decay} for decay in (weight_decay, 0.0)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # A parameter that ZeRO-3 has partitioned has no elements itself.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            group = groups[0 if len(shape) >= 2 and id(parameter) not in embedded else 1]
            group["params"].append(parameter)
            group["names"].append(name)
    return groups


def without_names(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The groups for an optimizer: without names, and without empty groups."""
    return [{key: value for key, value in group.items() if key != "names"} for group in groups if group["params"]]


def import_muon() -> None:
    """Import DeepSpeed's Muon without compiling its functions.

    DeepSpeed imports it in every run, to see that the optimizer is another one. Compiling would import torch's
    inductor, which takes more than a second.
    """
    from deepspeed.runtime import compiler

    own = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        with suppress(ImportError):  # a later DeepSpeed may have it elsewhere
            import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = own


def build_optimizer(
    kind: str, groups: Iterable[Mapping[str, Any]], *, lr: float, betas: Sequence[float], eps: float
) -> torch.optim.Optimizer | None:
    """Build AdamW for DeepSpeed, which then ignores the optimizer of its config.

    DeepSpeed takes each of these classes with every ZeRO stage (`ZERO_SUPPORTED_OPTIMIZERS` in its
    runtime/zero/utils.py). `kind` is one of `OPTIMIZERS`, or `deepspeed_cpu`.

    Returns:
        None for `deepspeed_cpu`: DeepSpeed builds that one from its config, which has the offload.

    Raises:
        ImportError: If the package is missing. A package that was built without its kernels raises its own error.
    """
    given = without_names(groups)
    settings: dict[str, Any] = {"lr": lr, "betas": (betas[0], betas[1]), "eps": eps}
    if kind == "deepspeed_cpu":
        return None
    if kind.startswith("torch"):
        return torch.optim.AdamW(given, fused=True if kind == "torch_fused" else None, **settings)
    if kind == "apex":
        from apex.optimizers import FusedAdam
    else:
        from deepspeed.ops.adam import FusedAdam
    optimizer: torch.optim.Optimizer = FusedAdam(given, adam_w_mode=True, **settings)
    return optimizer
