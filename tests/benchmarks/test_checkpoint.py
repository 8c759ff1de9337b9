"""The measurement of saving, at toy size."""

from pathlib import Path

import pytest

from tests.benchmarks.conftest import Rehearse


@pytest.mark.rehearsal
@pytest.mark.launch
@pytest.mark.timeout(300)
def test_rehearsal_compares_three_writers_on_one_and_two_ranks(rehearse: Rehearse, tmp_path: Path) -> None:
    found, output = rehearse("checkpoint", "--scratch", str(tmp_path))
    assert found["rehearsal"] is True
    for ranks in ("1", "2"):
        figures = found["ranks"][ranks]
        assert figures["bytes"] > 2**21
        assert len(figures["seconds"]) == 4
        for name, ratio in figures["ratios"].items():
            assert ratio["rounds"] == 4, name
        for seconds in figures["seconds"]:
            assert 0.0 < seconds["blocked"] < seconds["async"]
    assert "2 ranks: sync over plain" in output
    assert list(tmp_path.iterdir()) == [tmp_path / "checkpoint.json"], "a measurement leaves no files"
