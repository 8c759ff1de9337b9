"""Trainers side by side: each in a process of its own, woken one at a time, in the order A B C C B A.

A *round* is one block of whole steps of every subject; the tokens/s of the same round are compared. All subjects
are started several times over (a *set* of processes), since two processes of the same program differ by more than two
blocks of one. A block during which something else was busy is measured again. Tokens are random, never zeros.
"""

import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.comparison import Comparison, in_turns, judged, ratios, summary, table
from benchmarks.subjects.process import Block, Subject, wait_until_quiet
from benchmarks.subjects.turns import Order

_SMALL: dict[str, Any] = {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        **_SMALL,
        "intermediate_size": 688,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    },
    "gpt2": {"model_type": "gpt2", **_SMALL, "max_position_embeddings": 256, "tie_word_embeddings": True},
    "gpt2-medium-16l": {
        "model_type": "gpt2",
        "vocab_size": 50304,
        "hidden_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
}
"""In the keys of a recipe's `shape`; the last one is for a GPU."""
TOY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
"""Of a rehearsal, in place of a shape's own."""
TOKENS_SEED, WINDOWS = 20261121, 2048
TOTAL_STEPS = 5000
"""Run length given to each subject, so that it makes the choices of a real run (compiling)."""
MAX_OTHER_CORES, MAX_REPEATS, PATIENCE_S = 0.1, 3, 30.0
"""A block is measured again, once the machine is quiet, if other processes kept more cores busy."""
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
"""The glibc settings of `inheritune_ds.distributed.environment`, for programs without such a call."""
CALL_THE_ALLOCATOR = ("project", "project_compiled", "project_shipped", "plain_master", "plain_master_compiled")


@dataclass(frozen=True)
class Setting:
    """Conditions of a measurement, as `side_by_side_cli` describes them and `Order` passes them on.

    Attributes:
        subjects: Names, in the order of the first turns.
        processes: Starts of every subject.
        blocks: Rounds of every set of processes.
        environ: Set for all subjects.
    """

    subjects: tuple[str, ...]
    shape: tuple[str, Mapping[str, Any]]
    micro_batch: int
    accumulation: int
    device: str
    allocator: str
    processes: int
    blocks: int
    block_s: float
    warmup_steps: int
    max_other_cores: float
    environ: Mapping[str, str]
    litgpt_python: str | None
    nanogpt: str | None

    @property
    def step_tokens(self) -> int:
        """Tokens an optimizer step."""
        return self.micro_batch * self.accumulation * int(self.shape[1]["max_position_embeddings"])


@dataclass
class Measured:
    """For every set of processes its rounds, each a block of every subject, and the subjects' first answers."""

    setting: Setting
    sets: list[list[dict[str, Block]]] = field(default_factory=list)
    first: list[dict[str, dict[str, Any]]] = field(default_factory=list)

    def tokens_per_s(self, name: str) -> list[list[float]]:
        """Of a subject: a list of rounds for every set."""
        tokens = self.setting.step_tokens
        return [[tokens * r[name].steps / r[name].seconds for r in rounds] for rounds in self.sets]

    def ratios(self, comparison: Comparison) -> list[list[float]]:
        """Of two subjects, round by round, for every set."""
        above, below = comparison.above, comparison.below
        groups = zip(self.tokens_per_s(above), self.tokens_per_s(below), strict=True)
        return [ratios({above: one, below: other}, above, below) for one, other in groups]


def measure(setting: Setting) -> Measured:
    """Start, warm up and time all subjects of a setting, set after set.

    Raises:
        MachineError: If a subject cannot be run.
    """
    measured = Measured(setting)
    with tempfile.TemporaryDirectory() as scratch:
        tokens = Path(scratch) / "tokens.bin"
        write_tokens(tokens, setting.shape[1])
        for number in range(setting.processes):
            with ExitStack() as running:
                subjects: dict[str, Subject] = {}
                for name in setting.subjects:
                    print(f"set {number + 1} of {setting.processes}: starting {name}", flush=True)
                    subjects[name] = _start(name, setting, tokens, Path(scratch) / f"{number}-{name}")
                    running.callback(subjects[name].end)
                measured.first.append({name: subject.first for name, subject in subjects.items()})
                measured.sets.append(
                    [
                        {name: _quiet_block(subjects[name], setting) for name in turn}
                        for turn in in_turns(setting.subjects, setting.blocks)
                    ]
                )
    return measured


def write_tokens(path: Path, shape: Mapping[str, Any]) -> None:
    """Write a file of random tokens, always the same."""
    count = WINDOWS * shape["max_position_embeddings"] + 1
    np.random.default_rng(TOKENS_SEED).integers(shape["vocab_size"], size=count, dtype=np.uint16).tofile(path)


def _start(name: str, setting: Setting, tokens: Path, folder: Path) -> Subject:
    folder.mkdir()
    keep = setting.allocator == "keep"
    environ = {
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        "WANDB_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
        **({"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if setting.device == "cpu" else {}),
        **(KEEP_FREED_MEMORY if keep and name not in CALL_THE_ALLOCATOR else {}),
        **setting.environ,
    }
    order = Order(
        subject=name,
        shape=dict(setting.shape[1]),
        micro_batch=setting.micro_batch,
        accumulation=setting.accumulation,
        device=setting.device,
        keep_freed_memory=keep,
        tokens=str(tokens),
        folder=str(folder),
        warmup_steps=setting.warmup_steps,
        total_steps=TOTAL_STEPS,
        started_s=time.monotonic(),
        nanogpt=setting.nanogpt,
    )
    python = setting.litgpt_python if name == "litgpt" and setting.litgpt_python else sys.executable
    return Subject(order, python=python, environ=environ, log=folder / "log")


def _quiet_block(subject: Subject, setting: Setting) -> Block:
    """A block during which nothing else was busy, or the quietest of several."""
    blocks = [subject.block(setting.block_s)]
    while (blocks[-1].other_cores or 0.0) > setting.max_other_cores and len(blocks) <= MAX_REPEATS:
        wait_until_quiet(setting.max_other_cores, PATIENCE_S)
        blocks.append(subject.block(setting.block_s))
    best = min(blocks, key=lambda block: block.other_cores or 0.0)
    rate = setting.step_tokens * best.steps / best.seconds
    turn = "" if len(blocks) == 1 else f"  (turn {len(blocks)})"
    print(f"  {subject.order.subject:<22}{rate:12,.0f} tokens/s{turn}", flush=True)
    return replace(best, repeats=len(blocks) - 1)


def report(measured: Measured, comparisons: Sequence[Comparison]) -> tuple[dict[str, Any], list[str]]:
    """The figures of a setting as JSON, and as lines of two tables."""
    setting = measured.setting
    subjects = {name: _of_subject(measured, name) for name in setting.subjects}
    compared = {
        comparison.name: {
            "above": comparison.above,
            "below": comparison.below,
            **judged(comparison, measured.ratios(comparison)),
        }
        for comparison in comparisons
        if {comparison.above, comparison.below} <= set(setting.subjects)
    }
    figures = {
        **{key: getattr(setting, key) for key in ("micro_batch", "accumulation", "device", "allocator", "block_s")},
        "shape": {"name": setting.shape[0], **setting.shape[1]},
        "step_tokens": setting.step_tokens,
        "processes": setting.processes,
        "subjects": subjects,
        "ratios": compared,
        "rounds": [
            [{name: [b.steps, b.seconds, b.other_cores] for name, b in blocks.items()} for blocks in rounds]
            for rounds in measured.sets
        ],
    }
    rows = [(name, found, ".3f") for name, found in compared.items()]
    return figures, [*_subject_lines(setting, subjects), "", *table("ratio of tokens/s, same round", rows)]


def _of_subject(measured: Measured, name: str) -> dict[str, Any]:
    firsts = [first[name] for first in measured.first]
    blocks = [blocks[name] for rounds in measured.sets for blocks in rounds]
    return {
        "tokens_per_s": summary(measured.tokens_per_s(name)),
        "first_step_s": [first["first_step_s"] for first in firsts],
        "peak_memory_gib": max(block.peak_memory_gib for block in blocks),
        "loss": blocks[-1].loss,
        "max_other_cores": max((block.other_cores for block in blocks if block.other_cores is not None), default=None),
        "repeated_blocks": sum(block.repeats for block in blocks),
        "versions": firsts[0]["versions"],
        "notes": firsts[0]["notes"],
    }


def _subject_lines(setting: Setting, subjects: Mapping[str, Any]) -> list[str]:
    head = f"{setting.shape[0]}, micro-batch {setting.micro_batch} x {setting.accumulation}, {setting.device}, bf16, "
    lines = [
        f"{head}allocator: {setting.allocator}; {setting.processes} processes x {setting.blocks} blocks each",
        "{:<22}{:>10}  {:>19}  {:>12}{:>10}{:>13}".format(
            "subject", "tokens/s", "95 % interval", "first step s", "peak GiB", "other cores"
        ),
    ]
    for name, found in subjects.items():
        rate, other = found["tokens_per_s"], found["max_other_cores"]
        interval = f"{rate['interval_95'][0]:,.0f} to {rate['interval_95'][1]:,.0f}"
        lines.append(
            f"{name:<22}{rate['median']:>10,.0f}  {interval:>19}  {max(found['first_step_s']):>12.1f}"
            f"{found['peak_memory_gib']:>10.2f}{'?' if other is None else f'{other:.2f}':>13}"
        )
    return lines
