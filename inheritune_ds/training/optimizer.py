"""AdamW: its parameter groups and implementations.

Matrices decay: the weights of linear maps, convolutions, routers and experts. Everything else does not: norms, biases,
embeddings (including a tied head), and the states and scales of recurrent blocks. The number of dimensions does not
decide: expert biases, norms per head and Mamba's `A_log` have two.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

_MATRIX = re.compile(r"(^|_)(weight|proj|fn)$|^[wv]\d$|^[qkvor]$")
"""Names, within their module, of the matrices in transformers' models: `weight`, `gate_up_proj`, `in_proj_weight`,
`hc_fn` (DeepSeek-V4), `w1` (DBRX), `q` (XLNet)."""


def parameter_groups(
    model: torch.nn.Module, weight_decay: float, carried: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into a decayed and an undecayed group.

    A parameter decays if it is a matrix by its name (`_MATRIX`) and belongs to no embedding and no norm. Parameters
    whose optimizer state is carried from another run have groups of their own, before the others: ZeRO keeps one count
    of updates a group, and a new parameter under an old count would take a first update of (1 - beta1) /
    sqrt(1 - beta2) times the learning rate.

    Args:
        model: The model.
        weight_decay: Of the decayed groups.
        carried: Names of the parameters with carried state.

    Returns:
        Two groups, or four with `carried`, with `params`, `weight_decay` (0 in every second), and `names` (dotted, in
        the model's order).

    Source: nanoGPT's configure_optimizers and the authors' GPT-2 script exclude vectors; excluding the embeddings, too,
    follows facts of the paper's code (decay on 2-D Linear weights only). Mamba's own code marks `A_log` and `D` with
    `_no_weight_decay`.
    """
    undecayed = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if not _is_matrix(module, name, parameter)
    }
    decays = (weight_decay, 0.0) * (2 if carried else 1)
    groups: list[dict[str, Any]] = [{"params": [], "names": [], "weight_decay": decay} for decay in decays]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_new = bool(carried) and name not in carried
            group = groups[2 * is_new + (id(parameter) in undecayed)]
            group["params"].append(parameter)
            group["names"].append(name)
    return groups


def _is_matrix(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether a module's own parameter is the matrix of a linear map."""
    # A parameter that ZeRO-3 has partitioned has no elements itself.
    is_vector = len(getattr(parameter, "ds_shape", parameter.shape)) < 2
    if is_vector or isinstance(module, torch.nn.Embedding) or "Norm" in type(module).__name__:
        return False
    return _MATRIX.search(name) is not None


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
