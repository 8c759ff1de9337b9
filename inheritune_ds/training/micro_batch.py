"""The largest micro-batch that fits, found by real optimizer steps; the global batch stays what it is.

A size is tried only if the two before it, extended on a straight line, say that it fits: a rank that ran out of memory
in the middle of a step would leave the others waiting for it.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from inheritune_ds.errors import MachineError
from inheritune_ds.training.engine import Engine
from inheritune_ds.training.peak_memory import peak_memory_gib, reset_peak_memory

USABLE_RATIO = 0.95
"""Share of the memory that a step may take; the rest is for fragmentation and for what other programs do."""
_STEPS = 2  # the optimizer's state appears in the first


@dataclass(frozen=True)
class Trial:
    """What a step with a micro-batch of some size took, at the rank that took most.

    Attributes:
        size: Sequences per rank and micro-step.
        peak_gib: Memory at its peak.
    """

    size: int
    peak_gib: float


def largest_that_fits(
    sizes: list[int], limit_gib: float, measure: Callable[[int], float], say: Callable[[str], None]
) -> int:
    """Try sizes, from the smallest on, and return the largest that stays below a limit.

    Args:
        sizes: What may be taken, in ascending order.
        limit_gib: What a rank may use.
        measure: Peak GiB of real steps with a size.
        say: Told every trial.

    Raises:
        MachineError: If the smallest does not fit.
    """
    trials: list[Trial] = []
    left = sizes
    while left:
        trial = Trial(left[0], measure(left[0]))
        say(f"micro-batch {trial.size}: peak {trial.peak_gib:.2f} of {limit_gib:.2f} GiB")
        trials.append(trial)
        left = [size for size in sizes if size > trial.size and _expected_gib(trials, size) <= limit_gib]
        if len(trials) >= 2:
            left = left[-1:]  # straight to the largest that the line allows
    fitting = [trial.size for trial in trials if trial.peak_gib <= limit_gib]
    if not fitting:
        raise MachineError(
            f"a step with a micro-batch of {trials[0].size} takes {trials[0].peak_gib:.1f} GiB, but a rank may use "
            f"{limit_gib:.1f} GiB",
            allowed="a model, precision and ZeRO stage that fit",
            action='set kernels.activation_checkpointing to "full" in the DeepSpeed config, use more ranks with '
            "ds_configs/zero3.json, or offload with ds_configs/zero3_offload.json",
        )
    return max(fitting)


def _expected_gib(trials: list[Trial], size: int) -> float:
    """Peak of a size on the line through the last two trials; through one, no more than is known."""
    last = trials[-1]
    if len(trials) == 1:
        return last.peak_gib
    before = trials[-2]
    slope = (last.peak_gib - before.peak_gib) / (last.size - before.size)
    return last.peak_gib + max(slope, 0.0) * (size - last.size)


def measure_peak(
    build: Callable[[int, int], Engine], size: int, *, accumulation: int, seq_len: int, vocab_size: int
) -> float:
    """Peak GiB of two optimizer steps on random tokens, at the rank that takes most; all ranks call it together.

    Args:
        build: An engine for a micro-batch size and a number of micro-steps; it is thrown away afterwards.
        size: Sequences per rank and micro-step.
        accumulation: Micro-steps of a step in the run; two show what more of them take.
        seq_len: Tokens a window.
        vocab_size: Ids are drawn from it.
    """
    micro_steps = min(accumulation, 2)
    engine = build(size, micro_steps)
    reset_peak_memory()
    generator = torch.Generator().manual_seed(size)
    for _ in range(_STEPS):
        batches = [torch.randint(vocab_size, (size, seq_len + 1), generator=generator) for _ in range(micro_steps)]
        engine.train_step(batches, lr=0.0, stop=False)
    peak = torch.tensor(peak_memory_gib(), dtype=torch.float64, device=engine.device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    engine.close()
    del engine
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return float(peak)


def divisors(number: int) -> list[int]:
    """All divisors in ascending order: the micro-batches that leave the global batch unchanged."""
    return [size for size in range(1, number + 1) if number % size == 0]
