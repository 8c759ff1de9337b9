"""Point 1: resuming after any step is bitwise identical to the uninterrupted run."""

from functools import partial
from pathlib import Path
from typing import get_args

from benchmarks.campaign.launching import write_ds_config, write_recipe
from benchmarks.campaign.part import Cases, Figures, Part, totals
from benchmarks.campaign.resumes import KEEPS_ALL, NAME, STEPS, Precision, Seen, differences, launch
from tests.launching import numerics

RANKS = 2
_MICRO_BATCH = {1: 8, 4: 2}
"""Accumulation -> windows at a time, of the 8 that each of two ranks has in a step."""


def _compare(folder: Path, *, stage: int, precision: Precision, accumulation: int) -> Figures:
    """Train without a stop, then resume from every stop point in other processes; compare the results."""
    recipe = write_recipe(folder, NAME, checkpoint=KEEPS_ALL)
    ds_config = write_ds_config(folder, stage=stage, precision=precision, micro_batch=_MICRO_BATCH[accumulation])
    straight = launch(folder, recipe, ds_config, ranks=RANKS, out="run", steps=(0,))
    points = tuple(range(1, STEPS + 1))
    resumed = launch(folder, recipe, ds_config, ranks=RANKS, out="run", first="run-0", steps=points)
    return _same(folder, [{**own, **other} for own, other in zip(straight, resumed, strict=True)], points)


def _compare_one(folder: Path) -> Figures:
    """The same for one stop point, all in one launch, to be quick."""
    recipe = write_recipe(folder, NAME, checkpoint=KEEPS_ALL)
    ds_config = write_ds_config(folder, stage=1, precision="bf16", micro_batch=_MICRO_BATCH[4])
    seen = launch(folder, recipe, ds_config, ranks=RANKS, out="run", first="run-0", steps=(0, 7))
    return _same(folder, seen, (7,))


def _same(folder: Path, seen: list[dict[str, Seen]], points: tuple[int, ...]) -> Figures:
    straight = folder / "runs" / "run-0"
    wrong = [line for point in points for line in differences(folder / "runs" / f"run-{point}", straight)]
    wrong += [
        f"run-{point}: the random state of rank {rank} differs"
        for point in points
        for rank, own in enumerate(seen)
        if own[str(point)]["rng"] != own["0"]["rng"]
    ]
    assert not wrong, f"{len(wrong)} differences\n" + "\n".join(wrong[:20])
    logged = numerics(straight)
    assert len({row["train/loss"] for row in logged if "train/loss" in row}) == STEPS, "the losses do not move"
    return {"stop_points": len(points), "logged_values": len(points) * sum(len(row) for row in logged)}


_CASES: Cases = {
    f"zero{stage}-{precision}-accumulation{accumulation}": partial(
        _compare, stage=stage, precision=precision, accumulation=accumulation
    )
    for stage in (1, 2, 3)
    for precision in get_args(Precision)
    for accumulation in _MICRO_BATCH
}


PART = Part(
    name="exact",
    point=1,
    promise="Resuming after any step is bitwise identical to the uninterrupted run",
    cases={**_CASES, "zero1-bf16-accumulation4-after-7": _compare_one},
    short=("zero1-bf16-accumulation4-after-7",),
    summary=totals("stop_points", "logged_values"),
)
