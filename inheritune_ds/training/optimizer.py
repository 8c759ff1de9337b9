"""Which parameters decay: matrices do; norms, biases and embeddings (a tied head among them) do not."""

from collections.abc import Iterable
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
