"""Every kernel path of `benchmarks.kernel_parity` that can run here, held against fp64.

What cannot run here is skipped with the probe's own reason, but only where that may be: what needs no package and no
GPU must run.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from benchmarks.kernel_parity import (
    DEVICE,
    FAMILIES,
    LIMIT,
    MAY_BE_MISSING,
    PATHS,
    UPDATE_LIMIT,
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
    assert found.judged <= LIMIT[dtype], found
    assert found.worse_than_eager == ()


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
