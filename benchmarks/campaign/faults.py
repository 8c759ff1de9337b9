"""Point 8: invalid numbers: the update is skipped, several roll the run back, spikes are separated from noise.

In process groups of two ranks (drive_faults.py): for each ZeRO stage, precision, accumulation and offload, seven
faults, each in between two good steps. Through the whole program (drive_train.py): rollback, and its end. And the
spike rule on simulated runs (spikes.py), 10,000 steps each.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.campaign import spikes
from benchmarks.campaign.launching import TROUBLED, TinyRun, run_to_end, status, weights_sha256
from benchmarks.campaign.part import Cases, Figures, Part
from inheritune_ds.errors import TrainingError
from inheritune_ds.storage.files import read_json
from tests.launching import numerics

SEEDS = 10
STAGES = ("zero1", "zero2", "zero3")
LEAST_CAUGHT, MOST_FALSE = 0.99, 0.001
DRIVE = "benchmarks/campaign/drive_faults.py"
POLICY = {"rollback_after": 3, "max_rollbacks": 2}


def _left_out(folder: Path, settings: tuple[str, ...]) -> Figures:
    """All faults under several settings, in one launch."""
    out = folder / "found.json"
    run_to_end(folder, json.dumps({"cases": settings}), str(out), script=DRIVE, launcher="torchrun")
    found = read_json(out)
    broken = [f"{setting}: {line}" for setting in settings for line in found[setting]["broken"]]
    assert not broken, "\n".join(broken[:20])
    return {"left_out": sum(found[setting]["faults"] for setting in settings), "settings": len(settings)}


def _run(folder: Path, name: str, bad: str, removed: str = "0:0", *, expect: int = 0) -> tuple[Path, str]:
    tiny = TinyRun(folder, "torchrun", name=name, faults=POLICY)
    return tiny.path, tiny.to_end(expect=expect, script=TROUBLED, TROUBLE=f"spoil:{bad}:{removed}")


def _trained(run: Path) -> list[dict[str, Any]]:
    """The logged values of training, without the counts of faults."""
    counts = ("train/skipped_steps", "train/rollbacks")
    return [{key: value for key, value in row.items() if key not in counts} for row in numerics(run)]


def _one_update(folder: Path) -> Figures:
    """A batch that spoils the loss of one rank: one line, one count, and the run continues."""
    run, output = _run(folder, "one", "5")
    lines = [line for line in output.splitlines() if "update skipped" in line]
    assert len(lines) == 1, output[-4000:]
    assert lines[0].endswith("step 6: update skipped: the loss is nan"), lines
    counts = [row["train/skipped_steps"] for row in numerics(run) if "train/skipped_steps" in row]
    assert counts == [0] * 5 + [1] * 7, counts
    assert status(run)["state"] == "finished"
    return {"lines": len(lines), "counted": counts[-1]}


def _rollback(folder: Path) -> Figures:
    """Three bad batches: the run then equals one without them in its data."""
    run, output = _run(folder, "bad", "5,6,7")
    without, _ = _run(folder, "without", "none", "5:8")
    assert sum("rollback 1 of 2" in line for line in output.splitlines()) == 1, output[-4000:]
    assert output.count("update skipped") == 3, output[-4000:]
    assert _trained(run) == _trained(without)
    assert weights_sha256(run) == weights_sha256(without)
    return {"rollbacks": 1, "batches_skipped": 3}


def _rollbacks_used_up(folder: Path) -> Figures:
    """Bad batches without end: two rollbacks, then the run fails with its exit code."""
    run, output = _run(folder, "endless", "5+", expect=1)  # torchrun's own; each rank left with 11
    rollbacks = [number for number in (1, 2, 3) if f"rollback {number} of 2" in output]
    assert rollbacks == [1, 2], output[-4000:]
    assert output.count("update skipped") == 9, output[-4000:]
    left = status(run)
    assert (left["state"], left["exit_code"]) == ("failed", TrainingError.exit_code), left
    assert "after 2 rollbacks" in left["reason"], left
    return {"rollbacks": 2, "left_out": 9}


def _spikes(_folder: Path, kind: str, steps: int = 10_000, seeds: int = SEEDS) -> Figures:
    """The rule on simulated runs."""
    runs = [spikes.simulate(kind, seed=seed, steps=steps) for seed in range(seeds)]
    total = {key: sum(run[key] for run in runs) for key in ("clean", "false", "injected", "caught")}
    assert total["caught"] >= LEAST_CAUGHT * total["injected"], total
    assert total["false"] <= MOST_FALSE * total["clean"], total
    return {"kind": kind, **total}


def _cases() -> Cases:
    plain = [
        (stage, [f"{stage}-{precision}-{accumulation}" for precision in ("fp32", "bf16") for accumulation in (1, 4)])
        for stage in STAGES
    ]
    launches = [*plain, ("offload", [f"{setting}-offload" for _, settings in plain for setting in settings])]
    return {
        **{f"left-out-{name}": partial(_left_out, settings=tuple(settings)) for name, settings in launches},
        "left-out-short": partial(_left_out, settings=("zero1-bf16-4", "zero2-bf16-1-offload", "zero3-fp32-1")),
        "one-update": _one_update,
        "rollback": _rollback,
        "rollbacks-used-up": _rollbacks_used_up,
        **{f"spikes-{kind}": partial(_spikes, kind=kind) for kind in spikes.KINDS},
    }


def _summary(figures: list[Figures]) -> Mapping[str, Any]:
    simulated = [found for found in figures if "kind" in found]
    total = {key: sum(found[key] for found in simulated) for key in ("clean", "false", "injected", "caught")}
    driven = [found for found in figures if "settings" in found]
    return {
        "settings": sum(found["settings"] for found in driven),
        "faults_left_out": sum(found["left_out"] for found in driven),
        "spikes_injected": total["injected"],
        "spikes_caught_ratio": total["caught"] / total["injected"] if simulated else None,
        "false_ratio": total["false"] / total["clean"] if simulated else None,
        "by_noise": {
            found["kind"]: {
                "caught_ratio": found["caught"] / found["injected"],
                "false_ratio": found["false"] / found["clean"],
            }
            for found in simulated
        },
    }


PART = Part(
    name="faults",
    point=8,
    promise="A loss or gradient that is not finite changes no weight and no moment; several in a row roll the run back",
    cases=_cases(),
    short=("left-out-short",),
    summary=_summary,
)
