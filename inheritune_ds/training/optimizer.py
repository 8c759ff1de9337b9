"""AdamW: which parameters decay, and the implementations that can take the step.

Matrices decay; norms, biases and embeddings (a tied head among them) do not.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def parameter_groups(model: "torch.nn.Module", weight_decay: float) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into a decayed and an undecayed group.

    A parameter decays if it has two or more dimensions and belongs to no embedding module. A head that
    is tied to the token embedding is the same parameter, so it counts as embedding.

    Args:
        model: The target.
        weight_decay: Decay of the first group; the second has 0.

    Returns:
        Two groups with `params`, `weight_decay`, and `names` (dotted, in the model's order).

    Source: nanoGPT's configure_optimizers and the authors' GPT-2 script exclude vectors; leaving out the
    embeddings as well follows facts of the paper's code (decay on 2-D Linear weights only).
    """
    import torch

    embedded = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters()
    }
    decayed: list[tuple[str, torch.nn.Parameter]] = []
    undecayed: list[tuple[str, torch.nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and id(parameter) not in embedded
            (decayed if is_matrix else undecayed).append((name, parameter))
    return [_group(decayed, weight_decay), _group(undecayed, 0.0)]


def _group(named: Iterable[tuple[str, Any]], weight_decay: float) -> dict[str, Any]:
    named = list(named)
    return {
        "params": [parameter for _, parameter in named],
        "names": [name for name, _ in named],
        "weight_decay": weight_decay,
    }


def without_names(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The groups as an optimizer takes them: without names, and none without parameters."""
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
) -> "torch.optim.Optimizer | None":
    """Build AdamW for DeepSpeed, which keeps it through ZeRO: the engine sets the learning rate in its groups.

    DeepSpeed takes each of these classes with every ZeRO stage (`ZERO_SUPPORTED_OPTIMIZERS` in its
    runtime/zero/utils.py); what its config says about an optimizer is not read then.

    Args:
        kind: `apex`, `deepspeed`, `torch_fused`, `torch`, or `deepspeed_cpu`.
        groups: As `parameter_groups` returns them; a group without parameters is left out.
        lr: Learning rate of the first step.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.

    Returns:
        None for `deepspeed_cpu`: DeepSpeed builds that one from its config, where it knows about the offload.

    Raises:
        ImportError: If the package is missing, and whatever a package raises that was built without its kernels.
    """
    import torch

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
