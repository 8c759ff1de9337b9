"""The short form of the campaign's part `storage`."""

from pathlib import Path

import pytest

from benchmarks.campaign.storage import PART, can_mount


def test_prune_keeps_the_only_verified_checkpoint_on_a_full_disk(tmp_path: Path) -> None:
    assert PART.cases["retention"](tmp_path) == {"kept_while_damaged": 3}


@pytest.mark.thorough
@pytest.mark.launch
@pytest.mark.timeout(600)
def test_refused_operation_costs_only_its_save(tmp_path: Path) -> None:
    figures = PART.cases["some operations"](tmp_path)
    assert set(figures["by_kind"]) == {"EFBIG", "EIO", *(["ENOSPC"] if can_mount() else [])}
    assert figures["trials"] == sum(figures["by_kind"].values()) == figures["refused"] + figures["published"]
    assert figures["refused"] >= 2 * len(figures["by_kind"])
    assert figures["operations"] > 50, "the saves are not seen"
