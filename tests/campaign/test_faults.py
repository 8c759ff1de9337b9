"""The short form of the campaign's part `faults`."""

from pathlib import Path

import pytest

from benchmarks.campaign.cases import Case
from benchmarks.campaign.faults import PART


@pytest.mark.usefixtures("forked")
@pytest.mark.launch
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", PART.chosen(short=True), ids=lambda case: case.name)
def test_an_update_that_is_left_out_leaves_no_trace(case: Case, tmp_path: Path) -> None:
    assert case.run(tmp_path) == {"left_out": 21, "settings": 3}
