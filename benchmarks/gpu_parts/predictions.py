"""The planner's memory and speed against six measured cases."""

from dataclasses import replace
from typing import Any

from benchmarks.gpu_parts.case import Cases
from benchmarks.gpu_parts.part import Part
from benchmarks.gpu_parts.throughput import LARGE, MEDIUM, TARGET, case_of

MEMORY_ERROR, SPEED_ERROR = 0.05, 0.10
"""Largest error relative to the measurement."""
EAGER: dict[str, Any] = {"kernels": {"compile": False}}
FULL: dict[str, Any] = {"kernels": {"activation_checkpointing": "full"}}
BF16_SUMS: dict[str, Any] = {"data_types": {"grad_accum_dtype": "bf16"}}
CASES: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
    ("shipped", TARGET, 8, {}),
    ("bf16 sums", TARGET, 8, BF16_SUMS),
    ("shipped", MEDIUM, 32, {}),
    ("eager", MEDIUM, 16, EAGER),
    ("shipped", LARGE, 16, {}),
    ("full recomputation", TARGET, 16, FULL),
)
"""Name, model, micro-batch, keys that replace those of ds_configs/zero1.json."""
_MICRO_STEPS = 4


def predictions(part: Part) -> None:
    """Six cases; speed is judged where the program runs as shipped, since a plan speaks of that."""
    cases, errors = Cases(part), dict[str, dict[str, float | None]]()
    for words, model, size, document in CASES:
        case = case_of(part, model, micro_batch=size, step_windows=size * _MICRO_STEPS, block_steps=2)
        name = f"{model} x{size} {words}"
        found = cases.measure(replace(case, name=name.replace(" ", "-"), document=document))
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
