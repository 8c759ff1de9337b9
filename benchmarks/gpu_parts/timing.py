"""Time of something short on a device: blocks of calls, each between two synchronizations."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

BLOCKS, BLOCK_S = 5, 0.5
"""Number of blocks, and the length of each, about."""


def timed_blocks(call: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds of one call, once for every block; the calls before the first block are not counted."""
    for _ in range(2):
        call()
    calls = max(1, round(BLOCK_S / _block(call, device, 1))) if device.type == "cuda" else 1
    return [_block(call, device, calls) for _ in range(BLOCKS)]


def _block(call: Callable[[], object], device: torch.device, calls: int) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
