"""Find the largest micro-batch that fits by real steps."""

import gc
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from inheritune_ds.config.deepspeed import Resolved, batch_of
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.config.zero import read_layout
from inheritune_ds.distributed.failures import is_out_of_memory
from inheritune_ds.distributed.world import World
from inheritune_ds.errors import MachineError
from inheritune_ds.plan.memory import memory
from inheritune_ds.storage.files import read_json
from inheritune_ds.surgery.load import load_model
from inheritune_ds.training.engine import Engine
from inheritune_ds.training.kernels import Kernels
from inheritune_ds.training.packing import DocumentPacking
from inheritune_ds.training.peak_memory import peak_memory_gib, reset_peak_memory

logger = logging.getLogger(__name__)

USABLE_RATIO = 0.95
"""Share of the memory that a step may take; the rest is for the driver's context and for what other programs do."""
_STEPS = 2  # the optimizer's state appears in the first


def find_largest(  # noqa: PLR0913 - three of them by position
    resolved: Resolved,
    recipe: Recipe,
    target: Path,
    *,
    kernels: Kernels,
    packing: DocumentPacking | None,
    world: World,
    limit_gib: float,
) -> int:
    """Find the largest micro-batch that fits by real steps; all ranks call it together.

    Args:
        resolved: The config of the run.
        recipe: Owner of the global batch.
        target: Folder of the target.
        kernels: What the run computes with.
        packing: How it keeps documents apart, which takes memory as well.
        world: This rank among all.
        limit_gib: What a rank may use.

    Raises:
        MachineError: If not even the smallest fits.
    """
    windows, seq_len = recipe.training.batch_windows // world.size, recipe.training.seq_len

    def build(size: int, micro_steps: int) -> Engine:
        trial = dict(with_size(resolved, size, micro_steps).config)
        trial["train_batch_size"] = size * micro_steps * world.size
        return Engine(load_model(target, dtype="float32"), trial, world, kernels, packing, target=target)

    def measure(size: int) -> float:
        vocabulary = int((read_json(target / "config.json") or {})["vocab_size"])
        return measure_peak(build, size, accumulation=windows // size, seq_len=seq_len, vocab_size=vocabulary)

    sequence_gib = _sequence_gib(resolved, seq_len, world.size, documents=packing is not None)
    return largest_that_fits(divisors(windows), limit_gib, measure, sequence_gib=sequence_gib)


def _sequence_gib(resolved: Resolved, seq_len: int, world_size: int, *, documents: bool) -> float:
    """What one more sequence adds to the backward pass by the plan; 0 for a family that the plan does not know."""
    if resolved.shape is None:
        return 0.0
    layout = read_layout(resolved.config, seq_len=seq_len, world_size=world_size, documents=documents)
    one, two = (
        sum(memory(*resolved.shape, micro_batch_size=n, accumulation=2, **layout).backward.values()) for n in (1, 2)
    )
    return two - one


def with_size(resolved: Resolved, size: int, accumulation: int) -> Resolved:
    """A config with another micro-batch.

    Args:
        resolved: The config.
        size: Sequences per rank and micro-step.
        accumulation: Micro-steps per optimizer step.
    """
    return replace(resolved, config={**resolved.config, **batch_of(size, size * accumulation)})


def largest_that_fits(
    sizes: list[int],
    limit_gib: float,
    measure: Callable[[int], float],
    *,
    sequence_gib: float = 0.0,
) -> int:
    """Try sizes and return the largest that stays below a limit.

    Args:
        sizes: What may be taken, in ascending order.
        limit_gib: What a rank may use.
        measure: Peak GiB of real steps with a size; infinite where the memory did not suffice.
        sequence_gib: What one more sequence adds to the backward pass, by the plan; 0 where it is not known, and then
            no trial is more than twice the one before.

    Raises:
        MachineError: If the smallest does not fit.
    """
    peaks: dict[int, float] = {}
    size: int | None = sizes[0]
    while size is not None:
        peaks[size] = measure(size)
        logger.info("micro-batch %d: peak %.2f of %.2f GiB", size, peaks[size], limit_gib)
        size = _next(sizes, peaks, limit_gib, sequence_gib)
    fitting = [size for size, peak in peaks.items() if peak <= limit_gib]
    if not fitting:
        raise MachineError(
            f"a step with a micro-batch of {sizes[0]} takes {peaks[sizes[0]]:.1f} GiB, but a rank may use "
            f"{limit_gib:.1f} GiB",
            allowed="a model, precision and ZeRO stage that fit",
            action='set kernels.activation_checkpointing to "full" in the DeepSpeed config, use more ranks with '
            "ds_configs/zero3.json, or offload with ds_configs/zero3_offload.json",
        )
    return max(fitting)


def _next(sizes: list[int], peaks: dict[int, float], limit_gib: float, sequence_gib: float) -> int | None:
    """The largest size between the largest that fits and the smallest that does not that is expected to fit."""
    fitting = sorted(size for size, peak in peaks.items() if peak <= limit_gib)
    if not fitting:
        return None
    last, too_large = fitting[-1], min((size for size in peaks if size > fitting[-1]), default=math.inf)
    slope = sequence_gib
    if len(fitting) > 1:
        slope = max(slope, (peaks[last] - peaks[fitting[-2]]) / (last - fitting[-2]))
    left = [size for size in sizes if last < size < too_large and peaks[last] + slope * (size - last) <= limit_gib]
    if not sequence_gib:
        left = [size for size in left if size <= 2 * last] or left[:1]
    return left[-1] if left else None


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

    Returns:
        Of a GPU, what its allocator has reserved; of a CPU, resident memory; infinity where a single rank's GPU memory
        did not suffice.

    Raises:
        MachineError: If the memory of a rank among several did not suffice: the others cannot go on without it.
    """
    micro_steps = min(accumulation, 2)
    engine = build(size, micro_steps)
    device = engine.device
    reset_peak_memory()
    generator = torch.Generator().manual_seed(size)
    try:
        for _ in range(_STEPS):
            batches = [torch.randint(vocab_size, (size, seq_len + 1), generator=generator) for _ in range(micro_steps)]
            engine.train_step(batches, lr=0.0)
        own = torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else peak_memory_gib()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if dist.get_world_size() > 1:
            raise MachineError(
                f"a rank's memory did not suffice for a micro-batch of {size}",
                allowed="a size that fits on every rank",
                action="write a smaller train_micro_batch_size_per_gpu into the DeepSpeed config",
            ) from None
        own = math.inf
    peak = torch.tensor(own, dtype=torch.float64, device=device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    engine.close()
    del engine
    # Every trial compiles graphs of its own shape. Beyond dynamo's limit the next ones, and the run itself, would be
    # computed uncompiled.
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    reset_peak_memory()
    return float(peak)


def divisors(number: int) -> list[int]:
    """All divisors in ascending order: the micro-batches that leave the global batch unchanged."""
    return [size for size in range(1, number + 1) if number % size == 0]
