"""The short form of the campaign's part `publish`."""

from pathlib import Path

import pytest

from benchmarks.campaign.cases import Case
from benchmarks.campaign.publish import PART


@pytest.mark.thorough
@pytest.mark.launch
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", PART.chosen(short=True), ids=lambda case: case.name)
def test_the_pointer_never_names_an_incomplete_checkpoint(case: Case, tmp_path: Path) -> None:
    figures = case.run(tmp_path)
    assert figures["faults"] == 8
    assert figures["incomplete"] == 0 < figures["deepspeed_incomplete"]
