"""This program beside others on the GPU: the engine tax, Hugging Face's Trainer with DeepSpeed, nanoGPT."""

import time
from collections.abc import Sequence
from dataclasses import replace

from benchmarks import engine_tax, peers
from benchmarks.comparison import Comparison
from benchmarks.gpu_parts.part import Part
from benchmarks.side_by_side import SHAPES, TOY, Measured, Setting, measure, report
from benchmarks.side_by_side_cli import REHEARSAL_ENVIRON

SHAPE = "gpt2-medium-16l"
MICRO_BATCH, ACCUMULATION = 16, 4
MAX_SETS, BLOCKS, BLOCK_S = 3, 5, 2.0
BUSY_CORES = 2.0
"""Cores that other processes may keep busy: a GPU's step does not wait for them on a machine with sixteen."""


def tax(part: Part) -> None:
    """The engine tax with the same compiled kernels."""
    setting = _setting(part, ("plain_master_compiled", "project_compiled"))
    _measure_sets(part, setting, engine_tax.comparisons(setting))


def trainer(part: Part) -> None:
    """The program as shipped over Trainer with DeepSpeed."""
    setting = _setting(part, (peers.SHIPPED, "hf_trainer"))
    _measure_sets(part, setting, peers.comparisons(setting))


def nanogpt(part: Part) -> None:
    """The program as shipped over nanoGPT, which compiles too."""
    if part.nanogpt is None:
        part.report.skip("no nanoGPT checkout was given (--nanogpt FOLDER)")
        return
    setting = _setting(part, (peers.SHIPPED, "nanogpt"))
    _measure_sets(part, setting, peers.comparisons(setting))


def _setting(part: Part, subjects: tuple[str, ...]) -> Setting:
    real = Setting(
        subjects=subjects,
        shape=(SHAPE, SHAPES[SHAPE]),
        micro_batch=MICRO_BATCH,
        accumulation=ACCUMULATION,
        device=part.device,
        allocator="default",
        processes=1,
        blocks=BLOCKS,
        block_s=BLOCK_S,
        warmup_steps=5,
        max_other_cores=BUSY_CORES,
        environ=engine_tax.BENCHMARK.environ,
        litgpt_python=None,
        nanogpt=None if part.nanogpt is None else str(part.nanogpt),
    )
    toy = replace(
        real,
        shape=("toy", {**SHAPES[SHAPE], **TOY}),
        micro_batch=2,
        accumulation=2,
        blocks=2,
        block_s=0.0,
        warmup_steps=1,
        max_other_cores=float("inf"),
        environ=REHEARSAL_ENVIRON,
    )
    return part.sized(real, toy)


def _measure_sets(part: Part, setting: Setting, comparisons: Sequence[Comparison]) -> None:
    """Start all subjects again and again while the part's time lasts; judge after every set."""
    if part.rehearse:
        comparisons = [replace(comparison, bar=None) for comparison in comparisons]
    gathered, longest_s, lines = Measured(setting), 0.0, list[str]()
    sets = part.sized(MAX_SETS, 1)
    part.report.expect(*(f"set {number}" for number in range(1, sets + 1)))
    for number in range(1, sets + 1):
        if part.left_s < 1.1 * longest_s:
            part.report.line(f"{number - 1} of {MAX_SETS} sets of processes: the part's time lasts for no more")
            break
        start_s = time.monotonic()
        one = measure(setting)
        longest_s = max(longest_s, time.monotonic() - start_s)
        gathered.sets += one.sets
        gathered.first += one.first
        gathered.setting = replace(setting, processes=number)
        figures, lines = report(gathered, comparisons)
        part.report.figure("side by side", figures)
        for name, found in figures["ratios"].items():
            if found["bar"] is not None:
                part.report.bar(name, found["median"], **{"at_most" if found["at_most"] else "at_least": found["bar"]})
        part.report.done(f"set {number}")
    for line in lines:
        part.report.line(line)
