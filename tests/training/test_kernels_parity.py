"""Every kernel path of `benchmarks.kernel_parity` that can run here, held against fp64.

What cannot run here is skipped with the probe's own reason, but only where that may be: what needs no package and no
GPU must run.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from benchmarks.kernel_parity import (
    DEVICE,
    FAMILIES,
    LIMIT,
    LIMIT_3XTF32,
    MAY_BE_MISSING,
    PATHS,
    UPDATE_LIMIT,
    limit,
    path_error,
    update_error,
)
from inheritune_ds.config.kernels import OPTIMIZERS
from inheritune_ds.errors import InherituneError
from inheritune_ds.training.kernel_probes import optimizer_obstacle

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


if INTERPRETED:
    import tests.training.interpreted_liger  # noqa: F401 - its import is its effect


# Dynamo looks at the gradient of every input of a graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("dtype", LIMIT, ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.thorough) if name == "compiled" else name for name in PATHS]
)
def test_gradients_are_those_of_fp64(name: str, family: str, dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("numpy has no bf16, and the interpreter computes with it")
    try:
        found = path_error(PATHS[name], family, dtype)
    except InherituneError as error:
        if name not in MAY_BE_MISSING:
            raise
        pytest.skip(error.problem)
    assert found.judged <= limit(PATHS[name], dtype), found
    assert found.worse_than_eager == ()


def test_only_fp32_attention_on_a_gpu_has_a_limit_of_its_own() -> None:
    def differs(name: str, dtype: torch.dtype, device: str) -> bool:
        return limit(PATHS[name], dtype, device) != LIMIT[dtype]

    fp32 = torch.float32
    assert {name for name in PATHS if differs(name, fp32, "cuda")} == {
        *("sdpa", "selective checkpointing", "full checkpointing", "compiled", "liger")
    }
    assert not any(differs(name, fp32, "cpu") or differs(name, torch.bfloat16, "cuda") for name in PATHS)


def _tf32(values: torch.Tensor) -> torch.Tensor:
    """Rounded to TF32: 11 bits, in fp32."""
    return ((values.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def _tensor_core(left: torch.Tensor, right: torch.Tensor, *, split: bool) -> torch.Tensor:
    """A matrix product as CUTLASS computes it on tensor cores: eight products are added at once, the sum truncated."""
    high, other_high = _tf32(left), _tf32(right)
    pairs = [(high, other_high)]
    if split:
        pairs = [(_tf32(left - high), other_high), (high, _tf32(right - other_high)), *pairs]
    total = torch.zeros(*left.shape[:-1], right.shape[-1])
    for k in range(0, left.shape[-1], 8):
        for one, other in pairs:
            exact = total.double() + one[..., k : k + 8].double() @ other[..., k : k + 8, :].double()
            rounded = exact.float()
            toward_zero = torch.nextafter(rounded, torch.zeros_like(rounded))
            total = torch.where(rounded.double().abs() > exact.abs(), toward_zero, rounded)
    return total


class _Product(torch.autograd.Function):
    """A matrix product and its gradients by tensor cores."""

    @staticmethod
    def forward(ctx: Any, left: torch.Tensor, right: torch.Tensor, split: bool) -> torch.Tensor:  # noqa: FBT001
        ctx.save_for_backward(left, right)
        ctx.split = split
        return _tensor_core(left, right, split=split)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        left, right = ctx.saved_tensors
        how = {"split": ctx.split}
        return _tensor_core(grads[0], right.mT, **how), _tensor_core(left.mT, grads[0], **how), None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", [True, False], ids=["3xTF32", "TF32"])
def test_the_limit_of_fp32_attention_on_a_gpu_allows_3xtf32_and_no_tf32(
    family: str, monkeypatch: pytest.MonkeyPatch, *, split: bool
) -> None:
    product: Callable[..., torch.Tensor] = _Product.apply

    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float, **_: Any
    ) -> torch.Tensor:
        key, value = (given.repeat_interleave(query.shape[1] // given.shape[1], 1) for given in (key, value))
        scores = product(query, key.mT, split) * scale
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return product(scores.masked_fill(future, -torch.inf).softmax(-1), value, split)

    fp32 = torch.float32
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    error = path_error(PATHS["sdpa"], family, fp32).judged
    assert LIMIT[fp32] < error
    assert (error <= LIMIT_3XTF32 / 5) == split
    assert (error > 10 * LIMIT_3XTF32) == (not split)


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
    assert update_error(kind) <= UPDATE_LIMIT
