"""Hangs: which ones the full form tries."""

from benchmarks.campaign.hangs import EXPECTED, HANGS


def test_full_form_has_every_place() -> None:
    assert {hang.place for hang in HANGS} == set(EXPECTED)
    four = {"forward", "data", "collective", "wandb"}
    assert {hang.place for hang in HANGS if hang.launcher == "torchrun"} >= four
    assert {hang.place for hang in HANGS if hang.launcher == "deepspeed"} >= four
