"""Changed files: the search notices a check that does not look."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.campaign.flips import FLIPS, PART, Trial, make_checkpoints
from inheritune_ds.checkpoints import manifest as checkpoint_manifest


@pytest.mark.parametrize("blind", ["_hash_fault", "listing_fault"])
def test_trial_detects_a_missing_check(blind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(make_checkpoints(tmp_path), tmp_path / "plain")
    monkeypatch.setattr(checkpoint_manifest, blind, lambda *_: None)
    with pytest.raises(AssertionError, match=r"stale file of the right size: .* was chosen|cut in half: not reported"):
        trial.tamper()


def test_full_form_has_500_flips() -> None:
    launched: list[Any] = [case for name, case in PART.cases.items() if name not in PART.short]
    assert {run.keywords["stage"] for run in launched} == {1, 3}
    assert FLIPS * len(launched) == 500
