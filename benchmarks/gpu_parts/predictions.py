"""The planner's memory and speed against measured cases."""

from dataclasses import replace
from typing import Any

from benchmarks.gpu_parts.case import Cases
from benchmarks.gpu_parts.part import Part
from benchmarks.gpu_parts.throughput import LARGE, MEDIUM, TARGET, case_of

MEMORY_ERROR, SPEED_ERROR = 0.05, 0.10
"""Largest error relative to the measurement."""
EAGER: dict[str, Any] = {"kernels": {"compile": False}}
FULL: dict[str, Any] = {"kernels": {"activation_checkpointing": "full"}}
SELECTIVE: dict[str, Any] = {"kernels": {"activation_checkpointing": "selective"}}
BF16_SUMS: dict[str, Any] = {"data_types": {"grad_accum_dtype": "bf16"}}
Row = tuple[str, str, int, dict[str, Any]]
"""Name, model, micro-batch, keys that replace those of ds_configs/zero1.json."""
LLAMA: tuple[Row, ...] = (
    ("shipped", TARGET, 8, {}),
    ("selective recomputation", TARGET, 16, SELECTIVE),
    ("full recomputation", TARGET, 16, FULL),
    ("bf16 sums", TARGET, 8, BF16_SUMS),
)
GPT2: tuple[Row, ...] = (
    ("shipped", MEDIUM, 32, {}),
    ("eager", MEDIUM, 16, EAGER),
    ("shipped", LARGE, 16, {}),
)
_MICRO_STEPS = 4


def llama(part: Part) -> None:
    """The 13-block target, also with recomputation: `selective` keeps the output of attention."""
    _predictions(part, LLAMA)


def gpt2(part: Part) -> None:
    """GPT-2 medium's first 16 blocks and large's first 18."""
    _predictions(part, GPT2)


def _predictions(part: Part, rows: tuple[Row, ...]) -> None:
    """Speed is judged where the program runs as shipped, since a plan speaks of that."""
    cases, errors = Cases(part), dict[str, dict[str, float | None]]()
    names = [f"{model} x{size} {words}" for words, model, size, _ in rows]
    part.report.expect(*(name.replace(" ", "-") for name in names))
    for name, (words, model, size, document) in zip(names, rows, strict=True):
        given = {"document": document, "step_windows": size * _MICRO_STEPS}
        case = case_of(part, model, micro_batch=size, block_steps=part.sized(2, 1), **given)
        found = cases.measure(replace(case, name=name.replace(" ", "-")))
        if found is None:
            continue
        if found.out_of_memory:
            part.report.fail(f"{name}: out of memory, though {found.predicted_gib:.1f} GiB were predicted")
            continue
        memory = _error(found.predicted_gib, found.peak_gib)
        speed = _error(found.predicted_tokens_per_s, found.tokens_per_s["median"])
        errors[name] = {"memory": memory, "speed": speed}
        part.report.figure("relative errors", errors)
        part.report.bar(f"{name}: memory error", memory and abs(memory), at_most=MEMORY_ERROR)
        if words == "shipped":
            part.report.bar(f"{name}: speed error", speed and abs(speed), at_most=SPEED_ERROR)


def _error(predicted: float | None, measured: float | None) -> float | None:
    """Error of a prediction relative to the measurement; None without one of them."""
    return None if predicted is None or not measured else predicted / measured - 1.0
