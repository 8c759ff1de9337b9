"""AdamW's step by each implementation that works here, on the parameters of GPT-2 medium's first 16 blocks."""

from typing import Any

import torch

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
    """Time of a step; a missing optimizer gives a line."""
    device = torch.device(part.device)
    elements, tensors = part.sized((ELEMENTS, TENSORS), (TOY_ELEMENTS, TOY_TENSORS))
    found: dict[str, Any] = {}
    for kind in OPTIMIZERS:
        if part.rehearse and kind == "deepspeed":
            part.report.line("deepspeed: skipped, it would be compiled for this CPU first")
            continue
        obstacle = optimizer_obstacle(kind, device)
        if obstacle is not None:
            part.report.line(f"{kind}: {obstacle.reason}")
            continue
        seconds = spread(timed_blocks(_stepper(kind, elements, tensors, device), device))
        found[kind] = {"seconds": seconds, "gb_per_s": _BYTES * elements / seconds["median"] / 1e9}
        part.report.figure("optimizers", found)
        part.report.line(f"{kind}: {1000.0 * seconds['median']:.3f} ms, {found[kind]['gb_per_s']:.0f} GB/s")


def _stepper(kind: str, elements: int, tensors: int, device: torch.device) -> Any:
    parameters = [torch.nn.Parameter(torch.randn(elements // tensors, device=device)) for _ in range(tensors)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    groups = [{"params": parameters, "weight_decay": 0.1}]
    optimizer = build_optimizer(kind, groups, lr=1e-4, betas=(0.9, 0.95), eps=1e-8)
    assert optimizer is not None
    return optimizer.step
