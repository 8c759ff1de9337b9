"""Every way to compute a step against the same step in fp64: gradients of the model, updates of the optimizer.

A path is a row of PATHS; a new kernel is gated by a row of its own. What cannot run here is skipped with the probe's
own reason, but only where that may be: what needs no package and no GPU must run.

How gradients are compared. fp32: for every parameter, norm of the difference over norm of the gradient, at most 1e-6.
bf16: the fp64 reference has the same bf16-rounded weights. On some tensors (key projections, biases of norms) the
plain eager pass itself is off by 1 to 2%, because sums over tokens cancel. So the difference is held against the
norm of the whole gradient, at most 5e-3, and every tensor's own error against that of the eager pass in bf16.
"""

import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from inheritune_ds.errors import InherituneError
from inheritune_ds.training import engine
from inheritune_ds.training.kernel_probes import optimizer_obstacle
from inheritune_ds.training.kernel_words import ATTENTIONS, OPTIMIZERS, KernelRequest
from inheritune_ds.training.kernels import choose_kernels
from inheritune_ds.training.optimizer import build_optimizer, parameter_groups

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LIMIT = {torch.float32: 1e-6, torch.bfloat16: 5e-3}
TOKENS = 64


if INTERPRETED:
    import tests.training.interpreted_liger  # noqa: F401 - its import is its effect


def path(**asked: Any) -> KernelRequest:
    plain = {"attention": "eager", "optimizer": "torch", "liger": False, "loss": "plain", "compile": False}
    return KernelRequest(**{**plain, **asked})


PATHS: dict[str, KernelRequest] = {
    **{attention: path(attention=attention) for attention in ATTENTIONS},
    "chunked loss": path(loss="chunked"),
    "selective checkpointing": path(attention="sdpa", activation_checkpointing="selective"),
    "full checkpointing": path(attention="sdpa", activation_checkpointing="full"),
    "compiled": path(attention="sdpa", loss="chunked", compile=True),
    "liger modules": path(liger=True),
    "liger loss": path(loss="liger"),
    "liger": path(attention="sdpa", liger=True, loss="liger"),
}
MAY_BE_MISSING = {name for name in PATHS if name.startswith(("flash", "liger"))}


def tiny(family: str) -> PreTrainedModel:
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes: dict[str, dict[str, Any]] = {
        "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": TOKENS, **no_dropout},
        "llama": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    }
    sizes["llama"] |= {"intermediate_size": 96, "max_position_embeddings": TOKENS}
    torch.manual_seed(0)
    ids = {"vocab_size": 257, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, **ids, **sizes[family])
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.train()
    return model


def windows() -> torch.Tensor:
    return torch.randint(0, 257, (2, TOKENS + 1), generator=torch.Generator().manual_seed(1)).to(DEVICE)


Gradients = dict[str, torch.Tensor]


def gradients_of(model: PreTrainedModel) -> Gradients:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: gradient.double().cpu() for name, gradient in found.items() if gradient is not None}


@cache
def exact(family: str, dtype: torch.dtype) -> Gradients:
    """Gradients of the mean loss in fp64, at the weights as `dtype` rounds them."""
    model = tiny(family)
    nn.Module.to(model, DEVICE, dtype).double()
    model.set_attn_implementation("eager")
    tokens = windows()
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    torch.autograd.backward(functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
    return gradients_of(model)


def computed(request: KernelRequest, family: str, dtype: torch.dtype) -> Gradients:
    """The same gradients by the engine's own path to a model with these kernels."""
    model = tiny(family)
    nn.Module.to(model, DEVICE)
    kernels, _ = choose_kernels(
        request, config=model.config, device=DEVICE, dtype=dtype, zero_stage=1, offload=False, run_flops=None
    )
    taken, _ = engine._fit(model, kernels)
    assert taken == kernels
    nn.Module.to(model, dtype)
    tokens = windows()
    targets = tokens[:, 1:]
    loss, total = model(
        input_ids=tokens[:, :-1], targets=targets.contiguous(), factor=1.0 / targets.numel(), use_cache=False
    )
    loss.backward()
    assert float(total) / targets.numel() == pytest.approx(float(loss.detach()))
    return gradients_of(model)


def errors(found: Gradients, wanted: Gradients) -> tuple[dict[str, float], dict[str, float]]:
    """Each tensor's error over its own norm, and over the norm of the whole gradient."""
    assert found.keys() == wanted.keys()
    whole = float(torch.stack([gradient.norm() for gradient in wanted.values()]).norm())
    off = {name: float((found[name] - wanted[name]).norm()) for name in wanted}
    return {name: off[name] / float(wanted[name].norm()) for name in wanted}, {n: e / whole for n, e in off.items()}


@cache
def eager_errors(family: str) -> dict[str, float]:
    return errors(computed(PATHS["eager"], family, torch.bfloat16), exact(family, torch.bfloat16))[0]


# Dynamo looks at the gradient of every input of a graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("dtype", LIMIT, ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", PATHS)
def test_gradients_are_those_of_fp64(name: str, family: str, dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("numpy has no bf16, and the interpreter computes with it")
    try:
        found = computed(PATHS[name], family, dtype)
    except InherituneError as error:
        if name not in MAY_BE_MISSING:
            raise
        pytest.skip(error.problem)
    own, over_whole = errors(found, exact(family, dtype))
    if dtype == torch.float32:
        assert max(own.values()) <= LIMIT[dtype], own
        return
    assert max(over_whole.values()) <= LIMIT[dtype], over_whole
    eager = eager_errors(family)
    worse = {name: (error, eager[name]) for name, error in own.items() if error > max(LIMIT[dtype], 2.0 * eager[name])}
    assert not worse


@pytest.mark.skipif(INTERPRETED or DEVICE.type == "cuda", reason="Liger runs in this process already")
@pytest.mark.skipif(
    find_spec("liger_kernel") is None or find_spec("triton") is None, reason="liger-kernel or triton is not installed"
)
def test_liger_interpreted_on_a_cpu_gives_the_same_gradients() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--no-cov", "-q", "-k", "gradients and liger and llama and fp32", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_five_steps_of_an_optimizer_are_those_of_fp64(kind: str) -> None:
    if (DEVICE.type == "cpu" and kind in {"apex", "deepspeed"}) or (missing := optimizer_obstacle(kind, DEVICE)):
        pytest.skip("for a GPU" if DEVICE.type == "cpu" else str(missing))
    generator = torch.Generator().manual_seed(3)
    given = exact("llama", torch.float32)
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
    for name, before in start.items():
        wanted, found = (after[name] - before for after in weights)
        assert float((found - wanted).norm() / wanted.norm()) <= 1e-5, name
