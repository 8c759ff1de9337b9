"""The short form of the campaign's part `hangs`."""

from pathlib import Path

import pytest

from benchmarks.campaign.cases import Case
from benchmarks.campaign.hangs import EXPECTED, HANGS, MARGIN_S, PART


@pytest.mark.thorough
@pytest.mark.launch
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", PART.chosen(short=True), ids=lambda case: case.name)
def test_a_rank_that_sleeps_for_ever_ends_the_job_in_time(case: Case, tmp_path: Path) -> None:
    figures = case.run(tmp_path)
    assert figures["exit_code"] == 13
    assert 0.0 < figures["seconds_after_limit"] < MARGIN_S


def test_every_place_is_tried() -> None:
    assert {hang.place for hang in HANGS} == set(EXPECTED)
    four = {"forward", "data", "collective", "wandb"}
    assert {hang.place for hang in HANGS if hang.launcher == "torchrun"} >= four
    assert {hang.place for hang in HANGS if hang.launcher == "deepspeed"} >= four
