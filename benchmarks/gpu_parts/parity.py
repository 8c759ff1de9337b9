"""Every kernel path that works here, held against the same step in fp64 on the same device."""

from dataclasses import asdict
from typing import Any

import torch

from benchmarks import kernel_parity
from benchmarks.gpu_parts.part import Part
from inheritune_ds.config.kernels import OPTIMIZERS
from inheritune_ds.errors import InherituneError
from inheritune_ds.training.kernel_probes import optimizer_obstacle

_WORDS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def parity(part: Part) -> None:
    """Gradients of each path, family and precision, then the updates of each optimizer."""
    missing: dict[str, str] = {}
    errors: dict[str, Any] = {}
    for family in part.sized(kernel_parity.FAMILIES, kernel_parity.FAMILIES[:1]):
        for dtype in kernel_parity.LIMIT:
            _paths(part, family, dtype, errors, missing)
    _updates(part, missing)
    for name, why in missing.items():
        part.report.line(f"{name}: {why}")


def _paths(part: Part, family: str, dtype: torch.dtype, errors: dict[str, Any], missing: dict[str, str]) -> None:
    worst, worse = 0.0, 0
    where = f"{family}, {_WORDS[dtype]}"
    for name, request in kernel_parity.PATHS.items():
        try:
            found = kernel_parity.path_error(request, family, dtype)
        except InherituneError as error:
            if name not in kernel_parity.MAY_BE_MISSING:
                raise
            missing[f"{name}, {where}"] = error.problem.partition("\n")[0]
            continue
        errors[f"{name}, {where}"] = asdict(found)
        part.report.figure("relative errors of gradients", errors)
        worst, worse = max(worst, found.judged), worse + len(found.worse_than_eager)
        part.report.bar(f"gradients, {where}", worst, at_most=kernel_parity.LIMIT[dtype], of_gpu=False)
        part.report.bar(f"tensors twice as far off as eager, {where}", worse, at_most=0, of_gpu=False)


def _updates(part: Part, missing: dict[str, str]) -> None:
    found: dict[str, float] = {}
    for kind in OPTIMIZERS:
        if part.rehearse and kind in {"apex", "deepspeed"}:
            missing[kind] = "for a GPU"
        elif obstacle := optimizer_obstacle(kind, kernel_parity.DEVICE):
            missing[kind] = obstacle.reason
        else:
            found[kind] = kernel_parity.update_error(kind)
            part.report.figure("relative errors of five updates", found)
    worst = max(found.values())
    part.report.bar("updates of the optimizers", worst, at_most=kernel_parity.UPDATE_LIMIT, of_gpu=False)
