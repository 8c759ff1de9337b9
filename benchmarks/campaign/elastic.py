"""Point 7: a run resumes with another number of ranks or another ZeRO stage, and remains the same experiment.

Windows are compared one by one, in the order of the global batch. Losses are compared with those of the
uninterrupted run: fp32 sums in another order differ in their last bits, bf16 in its last few. Dropout is off, since its
draws follow the rank.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.campaign.launching import SHAPE, write_ds_config, write_recipe
from benchmarks.campaign.part import Cases, Figures, Part
from benchmarks.campaign.resumes import KEEPS_ALL, NAME, STEPS, Precision, Seen, differences, launch, windows_of
from inheritune_ds.tracking.metrics import read_metrics

TOLERANCE: Mapping[Precision, float] = {"fp32": 1e-6, "bf16": 5e-4}
"""Relative to the loss of the straight run."""
OFFLOADED: Mapping[str, Any] = {"offload_optimizer": {"device": "cpu"}}


def _sizes(folder: Path, *, precision: Precision, sizes: Sequence[int], stage: int) -> Figures:
    """Train on 2 ranks without a stop; then a second run that changes its number of ranks every few steps."""
    recipe = _recipe(folder)
    ds_config = write_ds_config(folder, stage=stage, precision=precision)
    straight = launch(folder, recipe, ds_config, ranks=2, out="run", steps=(0,))
    names, worst = ["run-0"], 0.0
    stops = [STEPS * number // len(sizes) for number in range(1, len(sizes))]
    for number, (stop, ranks) in enumerate(zip(stops, sizes[1:], strict=True), 1):
        seen = launch(folder, recipe, ds_config, ranks=ranks, out=f"part{number}", first=names[-1], steps=(stop,))
        names.append(f"part{number}-{stop}")
        _same_windows(straight, seen, stop)
        worst = max(worst, _loss_error(folder, names[-1], stop))
    return {"sizes": list(sizes), **_judged(precision, worst)}


def _stages(folder: Path, *, precision: Precision, keys: Sequence[Mapping[str, Any]]) -> Figures:
    """Train under one block of ZeRO settings without a stop, and from its middle on under another."""
    recipe = _recipe(folder)
    configs = [
        write_ds_config(folder, f"ds-{number}", precision=precision, zero_optimization=dict(block))
        for number, block in enumerate(keys)
    ]
    stop = STEPS // 2
    seen = launch(folder, recipe, configs[0], ranks=2, out="run", first="run-0", steps=(0, stop), then=configs[1])
    _same_windows(seen, seen, stop)
    worst = _loss_error(folder, f"run-{stop}", stop)
    return {"stages": [block["stage"] for block in keys], **_judged(precision, worst)}


def _judged(precision: Precision, worst: float) -> Figures:
    assert worst <= TOLERANCE[precision], f"losses differ by {worst:.1e}, more than {TOLERANCE[precision]:.0e}"
    return {"precision": precision, "loss_error": worst}


def _same_size(folder: Path, *, stage: int) -> Figures:
    """Resume under the same layout: bitwise identical."""
    recipe, ds_config = _recipe(folder), write_ds_config(folder, stage=stage, precision="bf16")
    stop = STEPS // 2
    launch(folder, recipe, ds_config, ranks=2, out="run", first="run-0", steps=(0, stop))
    wrong = differences(folder / "runs" / f"run-{stop}", folder / "runs" / "run-0")
    assert not wrong, "\n".join(wrong)
    return {"precision": "bf16", "loss_error": 0.0}


def _recipe(folder: Path) -> Path:
    return write_recipe(folder, NAME, checkpoint=KEEPS_ALL, target={"shape": SHAPE})


def _same_windows(straight: list[dict[str, Seen]], seen: list[dict[str, Seen]], stop: int) -> None:
    for step in range(stop, STEPS):
        own, wanted = windows_of(seen, stop, step), windows_of(straight, 0, step)
        assert own == wanted, f"step {step + 1} on {len(seen)} ranks reads other windows: {own}, not {wanted}"


def _loss_error(folder: Path, name: str, stop: int) -> float:
    """The largest relative difference of a loss, of training and validation, to that of the straight run."""
    own, other = (_losses(folder / "runs" / run) for run in (name, "run-0"))
    assert own.keys() == other.keys(), f"{name} has logged {sorted(own)}, not {sorted(other)}"
    later = [key for key in own if key[0] > stop]
    assert later
    return max(abs(own[key] - other[key]) / abs(other[key]) for key in later)


def _losses(run: Path) -> dict[tuple[int, str], float]:
    rows = read_metrics(run)
    return {(row["step"], key): row[key] for row in rows for key in ("train/loss", "val/loss") if key in row}


def _cases() -> Cases:
    stages: dict[str, Mapping[str, Any]] = {
        **{f"zero{stage}": {"stage": stage} for stage in (1, 2, 3)},
        **{f"zero{stage}-offload": {"stage": stage, **OFFLOADED} for stage in (2, 3)},
    }
    names = ["zero1", "zero2", "zero3", "zero1", "zero3", "zero2", "zero1", "zero2-offload", "zero3-offload", "zero1"]
    return {
        **{
            f"ranks-2-1-4-2-zero{stage}-{precision}": partial(
                _sizes, precision=precision, sizes=(2, 1, 4, 2), stage=stage
            )
            for stage in (1, 2, 3)
            for precision in TOLERANCE
        },
        **{
            f"{one}-to-{other}-{precision}": partial(_stages, precision=precision, keys=(stages[one], stages[other]))
            for one, other in pairwise(names)
            for precision in TOLERANCE
        },
        **{f"same-layout-zero{stage}": partial(_same_size, stage=stage) for stage in (1, 2, 3)},
    }


def _summary(figures: list[Figures]) -> Mapping[str, Any]:
    return {
        f"largest_relative_loss_error_{precision}": max(
            case["loss_error"] for case in figures if case["precision"] == precision
        )
        for precision in TOLERANCE
    }


PART = Part(
    name="elastic",
    point=7,
    promise="A run resumes with another number of ranks or ZeRO stage: the same windows, the same losses",
    cases=_cases(),
    short=("zero1-to-zero3-fp32",),
    summary=_summary,
)
