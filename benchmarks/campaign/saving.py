"""Point 12: a verified checkpoint costs little more than its bytes; an asynchronous one hardly holds training up."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from benchmarks import checkpoint
from benchmarks.campaign.part import Figures, Part
from inheritune_ds.storage.files import read_json


def _measure(folder: Path, *, ranks: int) -> Figures:
    """Run `benchmarks.checkpoint` for a number of ranks; its bars must be met."""
    out = folder / "checkpoint.json"
    checkpoint.main(["--ranks", str(ranks), "--scratch", str(folder), "--out", str(out)])
    found = read_json(out)["ranks"][str(ranks)]
    missed = [name for name, ratio in found["ratios"].items() if ratio["verdict"] == "missed"]
    assert not missed, f"missed: {', '.join(missed)}"
    return {"ranks": ranks, "bytes": found["bytes"], "ratios": found["ratios"], "plain": found["plain_mib_per_s"]}


def _summary(figures: list[Figures]) -> Mapping[str, Mapping[str, float]]:
    return {
        f"{found['ranks']} ranks (median)": {name: ratio["median"] for name, ratio in found["ratios"].items()}
        for found in figures
    }


PART = Part(
    name="saving",
    point=12,
    promise="Saving takes at most 1.25 times as long as writing and fsyncing the same bytes plainly; an asynchronous "
    "save holds training up for less than 15 % of that.",
    cases={f"{ranks}-ranks": partial(_measure, ranks=ranks) for ranks in (1, 2)},
    short=(),  # a measurement of seconds is nothing for a test: tests/benchmarks rehearses it
    summary=_summary,
)
