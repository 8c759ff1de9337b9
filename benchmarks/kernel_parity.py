"""Every way to compute a step against the same step in fp64: gradients of the model, updates of the optimizer.

A path is a row of PATHS; a new kernel is gated by a row of its own. `tests/training/test_kernels_parity.py` goes
through them wherever they can run, the GPU check (`benchmarks.gpu`) on a GPU.

How gradients are compared. fp32: for every parameter, norm of the difference over norm of the gradient, at most 1e-6.
bf16: the fp64 reference has the same bf16-rounded weights. On some tensors (key projections, biases of norms) the
plain eager pass itself is off by 1 to 2%, because sums over tokens cancel. So the difference is held against the
norm of the whole gradient, at most 5e-3, and every tensor's own error against that of the eager pass in bf16.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from benchmarks.ranks import fit, random_model
from inheritune_ds.config.kernels import ATTENTIONS, KernelRequest
from inheritune_ds.config.model import Shape
from inheritune_ds.training.optimizer import build_optimizer, parameter_groups

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LIMIT = {torch.float32: 1e-6, torch.bfloat16: 5e-3}
"""Of `PathError.judged`."""
UPDATE_LIMIT = 1e-5
"""Of `update_error`."""
FAMILIES = ("llama", "gpt2")
_TOKENS = 64


def _path(**asked: Any) -> KernelRequest:
    plain = {"attention": "eager", "optimizer": "torch", "liger": False, "loss": "plain", "compile": False}
    return KernelRequest(**{**plain, **asked})


PATHS: dict[str, KernelRequest] = {
    **{attention: _path(attention=attention) for attention in ATTENTIONS},
    "chunked loss": _path(loss="chunked"),
    "selective checkpointing": _path(attention="sdpa", activation_checkpointing="selective"),
    "full checkpointing": _path(attention="sdpa", activation_checkpointing="full"),
    "compiled": _path(attention="sdpa", loss="chunked", compile=True),
    "liger modules": _path(liger=True),
    "liger loss": _path(loss="liger"),
    "liger": _path(attention="sdpa", liger=True, loss="liger"),
}
MAY_BE_MISSING = {name for name in PATHS if name.startswith(("flash", "liger"))}


def tiny(family: str) -> PreTrainedModel:
    """A model of two blocks, always the same, in fp32 on the CPU."""
    own = {"num_key_value_heads": 2, "intermediate_size": 96} if family == "llama" else {"tie_word_embeddings": True}
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": _TOKENS}
    model = random_model(Shape.model_validate({"model_type": family, "vocab_size": 257, **sizes, **own}))
    model.train()
    return model


def _windows() -> torch.Tensor:
    return torch.randint(0, 257, (2, _TOKENS + 1), generator=torch.Generator().manual_seed(1)).to(DEVICE)


Gradients = dict[str, torch.Tensor]


def _gradients_of(model: PreTrainedModel) -> Gradients:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: gradient.double().cpu() for name, gradient in found.items() if gradient is not None}


@cache
def _exact(family: str, dtype: torch.dtype) -> Gradients:
    """Gradients of the mean loss in fp64, at the weights as `dtype` rounds them."""
    model = tiny(family)
    nn.Module.to(model, DEVICE, dtype).double()
    model.set_attn_implementation("eager")
    tokens = _windows()
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    torch.autograd.backward(functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
    return _gradients_of(model)


def _computed(request: KernelRequest, family: str, dtype: torch.dtype) -> Gradients:
    """The same gradients by the engine's own path to a model with these kernels."""
    model = tiny(family)
    assert fit(model, request, DEVICE, dtype)
    tokens = _windows()
    targets = tokens[:, 1:]
    loss, total = model(
        input_ids=tokens[:, :-1], targets=targets.contiguous(), factor=1.0 / targets.numel(), use_cache=False
    )
    loss.backward()
    assert abs(float(total) / targets.numel() / float(loss.detach()) - 1.0) < 1e-6
    return _gradients_of(model)


def _errors(found: Gradients, wanted: Gradients) -> tuple[dict[str, float], dict[str, float]]:
    """Each tensor's error over its own norm, and over the norm of the whole gradient."""
    assert found.keys() == wanted.keys()
    whole = float(torch.stack([gradient.norm() for gradient in wanted.values()]).norm())
    off = {name: float((found[name] - wanted[name]).norm()) for name in wanted}
    return {name: off[name] / float(wanted[name].norm()) for name in wanted}, {n: e / whole for n, e in off.items()}


@cache
def _eager_errors(family: str) -> dict[str, float]:
    found = _computed(PATHS["eager"], family, torch.bfloat16)
    return _errors(found, _exact(family, torch.bfloat16))[0]


@dataclass(frozen=True)
class PathError:
    """Errors of the gradients of a path.

    Attributes:
        own: The largest error of a tensor over its own norm.
        over_whole: The largest over the norm of the whole gradient.
        judged: The one that LIMIT is for: `own` in fp32, `over_whole` in bf16.
        worse_than_eager: Tensors that in bf16 exceed the limit and twice the error of eager.
    """

    own: float
    over_whole: float
    judged: float
    worse_than_eager: tuple[str, ...]


def path_error(request: KernelRequest, family: str, dtype: torch.dtype) -> PathError:
    """Compare the gradients of a path with those in fp64, on DEVICE.

    Raises:
        InherituneError: If a kernel of the path cannot be used here, with the reason.
    """
    own, over_whole = _errors(_computed(request, family, dtype), _exact(family, dtype))
    largest, largest_over_whole = max(own.values()), max(over_whole.values())
    if dtype == torch.float32:
        return PathError(largest, largest_over_whole, largest, ())
    eager = _eager_errors(family)
    worse = tuple(name for name, error in own.items() if error > max(LIMIT[dtype], 2.0 * eager[name]))
    return PathError(largest, largest_over_whole, largest_over_whole, worse)


def update_error(kind: str) -> float:
    """Largest relative error, over the parameters, of five steps of an optimizer against fp64."""
    generator = torch.Generator().manual_seed(3)
    given = _exact("llama", torch.float32)
    steps = [{n: g * torch.rand((), generator=generator) for n, g in given.items()} for _ in range(5)]
    weights = []
    for dtype, which in ((torch.float64, "torch"), (torch.float32, kind)):
        model = tiny("llama")
        nn.Module.to(model, DEVICE, dtype)
        optimizer = build_optimizer(which, parameter_groups(model, 0.1), lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
        assert optimizer is not None
        for number, step in enumerate(steps):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (number + 1)  # as the engine sets it
            for name, parameter in model.named_parameters():
                parameter.grad = step[name].to(DEVICE, dtype)
            optimizer.step()
        weights.append({name: parameter.detach().double().cpu() for name, parameter in model.named_parameters()})
    start = {name: parameter.detach().double() for name, parameter in tiny("llama").named_parameters()}
    changes = [{name: after[name] - before for name, before in start.items()} for after in weights]
    return max(float((changes[1][name] - wanted).norm() / wanted.norm()) for name, wanted in changes[0].items())
