"""The measurement of saving, at toy size."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import checkpoint
from inheritune_ds.storage.files import read_json
from tests.launching import ROOT, environment


@pytest.mark.rehearsal
@pytest.mark.launch
@pytest.mark.timeout(300)
def test_rehearsal_compares_the_three_ways_on_one_and_two_ranks(tmp_path: Path) -> None:
    out = tmp_path / "checkpoint.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.checkpoint", "--rehearse", "--out", str(out), "--scratch", str(tmp_path)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = read_json(out)
    assert found["rehearsal"] is True
    for ranks in ("1", "2"):
        figures = found["ranks"][ranks]
        assert figures["bytes"] > 2**21
        assert len(figures["seconds"]) == 4
        for name, ratio in figures["ratios"].items():
            assert ratio["rounds"] == 4, name
        for seconds in figures["seconds"]:
            assert 0.0 < seconds["blocked"] < seconds["async"]
    assert "2 ranks: sync over plain" in done.stdout
    assert list(tmp_path.iterdir()) == [out], "a measurement leaves no files"


def test_a_bar_is_that_of_the_issue() -> None:
    bars = {comparison.name: comparison.bar for comparison in checkpoint.COMPARISONS if comparison.bar is not None}
    assert bars == {"sync over plain": 1.25, "async, blocked, over plain": 0.15}
