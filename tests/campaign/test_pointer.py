"""Pointers and lost checkpoints: the short form, and that it notices a run that starts over by itself."""

from pathlib import Path

import pytest

from benchmarks.campaign.pointer import LOSSES, PART, POINTERS
from inheritune_ds.checkpoints.store import CheckpointStore


def test_short_form_has_every_damage() -> None:
    assert len(PART.short) == len(POINTERS) + len(LOSSES)


def test_trial_detects_a_store_that_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(_store: CheckpointStore) -> None:
        """Find no checkpoint."""

    monkeypatch.setattr(CheckpointStore, "newest_intact", forgetful)
    for number, name in enumerate(PART.short):
        with pytest.raises(AssertionError, match="None was chosen"):
            PART.cases[name](tmp_path / str(number))
