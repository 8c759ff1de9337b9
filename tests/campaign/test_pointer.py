"""Pointers and lost checkpoints: the short form, and that it notices a run that starts over by itself."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.campaign.cases import Case
from benchmarks.campaign.pointer import LOSSES, PART, POINTERS
from inheritune_ds.checkpoints.store import CheckpointStore

SHORT = PART.chosen(short=True)


@pytest.mark.parametrize("case", SHORT, ids=lambda case: case.name)
def test_the_newest_intact_is_used_and_lost_ones_are_refused(case: Case, tmp_path: Path) -> None:
    figures = case.run(tmp_path)
    assert (figures["pointers"], figures["refusals"]) == ((2, 0) if case.name.startswith("pointer_") else (0, 1))


def test_the_short_form_has_every_harm() -> None:
    assert len(SHORT) == len(POINTERS) + len(LOSSES)


def test_a_store_that_starts_over_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(_store: CheckpointStore, _say: Any) -> None:
        """As if nothing had ever been saved."""

    monkeypatch.setattr(CheckpointStore, "newest_intact", forgetful)
    for number, case in enumerate(SHORT):
        with pytest.raises(AssertionError, match="None was chosen"):
            case.run(tmp_path / str(number))
