"""Exact resume: the short case, and that the comparison sees a difference."""

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.campaign.exact import PART
from benchmarks.campaign.resumes import STEPS, differences, stopped_after
from inheritune_ds.checkpoints.fragments import file_name
from inheritune_ds.checkpoints.manifest import published


@pytest.mark.usefixtures("forked")
@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_resumed_run_is_bitwise_identical(tmp_path: Path) -> None:
    (name,) = PART.short
    assert PART.cases[name](tmp_path)["stop_points"] == 1
    finished, other = tmp_path / "runs" / "run-0", tmp_path / "runs" / "run-7"
    assert differences(other, finished) == []
    spoil_row(other, step=9)
    spoil_state(other)
    found = differences(other, finished)
    assert len(found) == 2
    assert "run-7: logged {'step': 9" in found[0]
    assert "run-7: another files" in found[1]


def spoil_row(run: Path, step: int) -> None:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    row = next(row for row in rows if row["step"] == step)
    row["train/loss"] *= 1 + 1e-15
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def spoil_state(run: Path) -> None:
    """Change the last bit of one value."""
    path = next(published(run / "checkpoints")) / file_name(0)
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.unlink()  # it may be a link
    path.write_bytes(content)


def test_full_form_has_every_stage_precision_and_accumulation() -> None:
    names = PART.cases.keys() - set(PART.short)
    assert Counter(name.split("-")[0] for name in names) == {"zero1": 4, "zero2": 4, "zero3": 4}
    assert len({tuple(name.split("-")) for name in names}) == 12


def test_stopped_after_restores_the_run_folder(tmp_path: Path) -> None:
    run = tmp_path / "finished"
    for step in range(1, STEPS + 1):
        (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    for name in ("eval", "export", "report"):
        (run / name).mkdir()
    for name in ("eval/validation-step-00000006.json", "eval/validation-step-00000012.json", "run.json", "status.json"):
        (run / name).write_text("{}")
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(STEPS + 1)))
    stopped_after(run, tmp_path / "stopped", 7)
    stopped = tmp_path / "stopped"
    assert sorted(path.name for path in (stopped / "checkpoints").iterdir()) == [
        "latest",
        *(f"step-{step:08d}" for step in range(1, 8)),
    ]
    assert sorted(path.name for path in stopped.iterdir()) == ["checkpoints", "eval", "metrics.jsonl"]
    assert [path.name for path in (stopped / "eval").iterdir()] == ["validation-step-00000006.json"]
    assert [json.loads(line)["step"] for line in (stopped / "metrics.jsonl").read_text().splitlines()] == list(range(8))
    assert len((run / "metrics.jsonl").read_text().splitlines()) == STEPS + 1
