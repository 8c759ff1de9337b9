"""AdamW by each implementation that works here: error of five updates against fp64, and time of a step.

Time is taken on as many parameters as GPT-2 medium's first 16 blocks have.
"""

from typing import Any

import torch

from benchmarks import kernel_parity
from benchmarks.gpu_parts.part import Part
from benchmarks.gpu_parts.timing import spread, timed_blocks
from inheritune_ds.config.kernels import OPTIMIZERS
from inheritune_ds.training.kernel_probes import optimizer_obstacle
from inheritune_ds.training.optimizer import build_optimizer

ELEMENTS, TENSORS = 254_100_000, 200
TOY_ELEMENTS, TOY_TENSORS = 10_000, 4
_BYTES = 28
"""Read and written for each parameter: weight, gradient and two moments in fp32; all but the gradient written."""


def optimizers(part: Part) -> None:
    """Error and time; a missing optimizer gives a line."""
    device = torch.device(part.device)
    elements, tensors = part.sized((ELEMENTS, TENSORS), (TOY_ELEMENTS, TOY_TENSORS))
    found: dict[str, Any] = {}
    part.report.expect(*OPTIMIZERS)
    for kind in OPTIMIZERS:
        reason = _reason_against(part, kind, device)
        if reason:
            part.report.line(f"{kind}: {reason}")
        else:
            error = kernel_parity.update_error(kind)
            seconds = spread(timed_blocks(_stepper(kind, elements, tensors, device), device))
            rate = _BYTES * elements / seconds["median"] / 1e9
            found[kind] = {"error": error, "seconds": seconds, "gb_per_s": rate}
            part.report.figure("optimizers", found)
            part.report.line(f"{kind}: {1000.0 * seconds['median']:.3f} ms, {rate:.0f} GB/s, error {error:.1e}")
            worst = max(one["error"] for one in found.values())
            part.report.bar("updates of the optimizers", worst, at_most=kernel_parity.UPDATE_LIMIT, of_gpu=False)
        part.report.done(kind)


def _reason_against(part: Part, kind: str, device: torch.device) -> str:
    if part.rehearse and kind == "deepspeed":
        return "skipped, it would be compiled for this CPU first"
    obstacle = optimizer_obstacle(kind, device)
    return obstacle.reason if obstacle is not None else ""


def _stepper(kind: str, elements: int, tensors: int, device: torch.device) -> Any:
    parameters = [torch.nn.Parameter(torch.randn(elements // tensors, device=device)) for _ in range(tensors)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    groups = [{"params": parameters, "weight_decay": 0.1}]
    optimizer = build_optimizer(kind, groups, lr=1e-4, betas=(0.9, 0.95), eps=1e-8)
    assert optimizer is not None
    return optimizer.step
