"""The short forms of the campaign's parts `signals_python`, `signals_deepspeed` and `signals_torchrun`."""

from itertools import product
from pathlib import Path

import pytest

from benchmarks.campaign.cases import Case
from benchmarks.campaign.signals import ALLOWED_S, PARTS, SIGNALS, WHERE, trials

SHORT = [pytest.param(case, id=f"{part.name}-{case.name}") for part in PARTS for case in part.chosen(short=True)]


@pytest.mark.thorough
@pytest.mark.launch
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", SHORT)
def test_a_signal_makes_every_rank_save_and_leave(case: Case, tmp_path: Path) -> None:
    figures = case.run(tmp_path)
    assert figures["exit_code"] == 0
    assert figures["seconds_to_leave"] < ALLOWED_S


def test_every_signal_is_sent_everywhere_to_everybody() -> None:
    for launcher in ("deepspeed", "torchrun"):
        listed = {(trial.where, trial.number, trial.who) for trial in trials(launcher)}
        assert listed >= set(product(WHERE, SIGNALS, ("one", "all", "twice")))
    assert {(trial.where, trial.number) for trial in trials("python")} == set(product(WHERE, SIGNALS))
