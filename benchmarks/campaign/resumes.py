"""Shared by the parts `exact` and `elastic`: restoring a run folder as of a step, resuming from it, comparing.

`stopped_after` makes the run folder of a launch that stopped right after a checkpoint out of the folder of an
uninterrupted run that kept all its checkpoints: one run gives every stop point.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

from benchmarks.campaign.launching import run_to_end
from inheritune_ds.checkpoints.manifest import POINTER, published, read_manifest, step_of
from inheritune_ds.storage.files import blake3_file, read_json
from tests.launching import numerics, rows

STEPS = 12
NAME = "tiny"
DRIVER = "benchmarks/campaign/drive_runs.py"
KEEPS_ALL = {"interval_steps": 1, "keep": STEPS + 1}
Precision = Literal["fp32", "bf16"]
Seen = dict[str, Any]
"""Observations of a rank in a launch: `rng`, a sha256 of its final random state, and `windows`, by step the
micro-batches that it read, each window as a sha256 of its tokens."""


def stopped_after(finished: Path, run: Path, step: int) -> None:
    """Make the folder `run` as it was right after the checkpoint of a step, from a run that kept all checkpoints."""
    after = {path.name for path in published(finished / "checkpoints") if step_of(path) > step}
    after |= {path.name for path in (finished / "eval").iterdir() if _step_in(path) > step}
    # A probe, a status, an export and a report are of the end.
    gone = {*after, "probe.safetensors", "status.json", "run.json", "export", "report", POINTER, ".lock"}
    shutil.copytree(finished, run, ignore=lambda _folder, names: gone.intersection(names), copy_function=os.link)
    (run / "checkpoints" / POINTER).write_text(f"step-{step:08d}\n", encoding="utf-8")
    metrics = run / "metrics.jsonl"
    kept = [json.dumps(row) + "\n" for row in rows(run) if row["step"] <= step]
    metrics.unlink()  # a link: the other run's file must stay as it is
    metrics.write_text("".join(kept), encoding="utf-8")


def _step_in(path: Path) -> int:
    number = path.stem.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def launch(  # noqa: PLR0913 - each is one word of the driver
    folder: Path,
    recipe: Path,
    ds_config: Path,
    *,
    ranks: int,
    out: str,
    first: str | None = None,
    steps: tuple[int, ...],
    then: Path | None = None,
) -> list[dict[str, Seen]]:
    """Run to the end from several stop points, one after the other, in one launched process group.

    The arguments are those of the driver; the recipe is named NAME. Returns the observations of every rank, by stop
    point.
    """
    paths = {"recipe": str(recipe), "ds_config": str(ds_config), "then": str(then or ds_config)}
    words = json.dumps({**paths, "out": out, "steps": steps, "first": first})
    run_to_end(folder, str(folder), words, launcher="torchrun", ranks=ranks, script=DRIVER)
    return [read_json(folder / f"{out}.rank{rank}.json") for rank in range(ranks)]


def final_state(run: Path) -> dict[str, Any]:
    """A run's last checkpoint: state, hash of every file (masters, moments), counters, steps; hash of its export."""
    checkpoint = next(published(run / "checkpoints"))
    manifest = read_manifest(checkpoint)
    assert manifest is not None, f"{checkpoint} has no manifest"
    assert manifest["state"]["step"] == STEPS, f"{checkpoint} is not the last one"
    state = {key: value for key, value in manifest["state"].items() if key != "train_seconds"}
    files = {name: blake3_file(checkpoint / name) for name in manifest["files"]}
    exported = read_json(run / "export" / "manifest.json")["files"]
    layout = {key: manifest[key] for key in ("engine", "parameters")}
    return {"state": state, "files": files, **layout, "weights": exported["model.safetensors"]["sha256"]}


def differences(run: Path, straight: Path) -> list[str]:
    """Differences between two finished runs: logged values, state, weights."""
    found = []
    own, other = numerics(run), numerics(straight)
    for mine, theirs in zip(own, other, strict=False):
        if mine != theirs:
            found.append(f"{run.name}: logged {mine}, not {theirs}")
    if len(own) != len(other):
        found.append(f"{run.name}: {len(own)} rows logged, not {len(other)}")
    state, wanted = final_state(run), final_state(straight)
    found += [
        f"{run.name}: another {key}: {state[key]}, not {wanted[key]}" for key in state if state[key] != wanted[key]
    ]
    return found


def windows_of(seen: list[dict[str, Seen]], point: int, step: int) -> list[str]:
    """The windows of a step in the order of the global batch, from the readings of each rank."""
    shares = [rank[str(point)]["windows"][str(step)] for rank in seen]
    return [window for micro_batches in zip(*shares, strict=True) for share in micro_batches for window in share]
