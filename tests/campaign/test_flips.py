"""Changed files: the short form, and that it notices a check that does not look."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.campaign.cases import Case
from benchmarks.campaign.flips import FLIPS, PART, Trial, make_checkpoints
from inheritune_ds.checkpoints import manifest as checkpoint_manifest

SHORT = PART.chosen(short=True)


@pytest.mark.parametrize("case", SHORT, ids=lambda case: case.name)
def test_every_changed_file_is_found_where_a_plain_load_finds_few(case: Case, tmp_path: Path) -> None:
    figures = case.run(tmp_path)
    assert (figures["flips"], figures["tampered"]) == (40, 15)
    assert figures["plain_loads_in_silence"] > figures["plain_loads"] // 2
    assert figures["slowest_fallback_s"] < 5.0


@pytest.mark.parametrize("blind", ["_hash_fault", "listing_fault"])
def test_a_check_that_does_not_look_is_noticed(blind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(make_checkpoints(tmp_path), tmp_path / "plain")
    monkeypatch.setattr(checkpoint_manifest, blind, lambda *_: None)
    with pytest.raises(AssertionError, match=r"stale file of the right size: .* was chosen|cut in half: not told"):
        trial.tamper()


def test_the_full_form_has_five_hundred_flips() -> None:
    launched: list[Any] = [case.run for case in PART.cases() if case.name not in PART.short]
    assert {run.keywords["stage"] for run in launched} == {1, 3}
    assert FLIPS * len(launched) == 500
