"""The driver's facts about the GPUs, from which a run is planned, against those of torch, which trains."""

from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.gpu_parts.part import Part
from inheritune_ds.plan.gpus import identify
from inheritune_ds.plan.machine import detect_gpus
from inheritune_ds.plan.model_size import GIB

MEMORY_ERROR = 0.02
"""Relative: the driver reports more than a program can have."""
_TOY = SimpleNamespace(name="NVIDIA H200", memory_gib=140.4, compute_capability=(9, 0))
_TOY_OF_TORCH = SimpleNamespace(name="NVIDIA H200", total_memory=int(139.8 * GIB), major=9, minor=0)


def facts(part: Part) -> None:
    """Name, memory and compute capability of every GPU that this process sees."""
    part.report.expect("facts")
    reported: list[Any] = [_TOY]
    of_torch: list[Any] = [_TOY_OF_TORCH]
    if not part.rehearse:
        reported = [*detect_gpus()]
        of_torch = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    part.report.bar("GPUs of torch over those reported", len(of_torch) / len(reported), at_least=1.0, of_gpu=False)
    part.report.bar("GPUs reported over those of torch", len(reported) / len(of_torch), at_least=1.0, of_gpu=False)
    for number, (one, other) in enumerate(zip(reported, of_torch, strict=False)):
        same = (one.name, one.compute_capability) == (other.name, (other.major, other.minor))
        part.report.bar(f"GPU {number}: name and capability are torch's", int(same), at_least=1, of_gpu=False)
        off = one.memory_gib / (other.total_memory / GIB) - 1.0
        part.report.bar(f"GPU {number}: memory error", abs(off), at_most=MEMORY_ERROR, of_gpu=False)
        known = identify(other.name)
        rates = "no known GPU" if known is None else f"{known.label}, {known.peak_bf16_flops / 1e12:.0f} TFLOP/s"
        part.report.line(f"GPU {number}: {other.name}, {other.total_memory / GIB:.1f} GiB of torch; {rates}")
    part.report.done("facts")
