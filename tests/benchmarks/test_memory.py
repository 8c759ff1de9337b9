"""The memory benchmark: real engines against the planner, and the counter that it rests on."""

import pytest
import torch

from benchmarks.live_bytes import LiveBytes, live_tensors, storages
from benchmarks.memory import RANKS, cases
from tests.benchmarks.conftest import Rehearse

MIB = 2**20


def test_live_bytes_follows_tensors_from_operator_to_last_reference() -> None:
    before = torch.zeros(MIB // 4)
    live = LiveBytes([before, before[:4]])
    with live:
        assert live.now == MIB, "a view is no memory of its own"
        one = torch.ones(MIB)
        two = one + 1.0
        assert live.now == 9 * MIB
        del one
        assert live.now == 5 * MIB
        two.mul_(3.0)
        meta = torch.empty(MIB, device="meta")
        del before
    assert (live.now, live.peak) == (4 * MIB, 9 * MIB)
    del two, meta
    assert live.now == 0


def test_storages_counts_each_once() -> None:
    tensor = torch.zeros(8)
    assert len(storages([tensor, tensor[2:], tensor.view(2, 4)])) == 1
    meta = torch.empty(8, device="meta")
    found = live_tensors()
    assert any(one is tensor for one in found)
    assert not any(one is meta for one in found)


@pytest.mark.parametrize("ranks", RANKS)
def test_cases_cover_every_stage_precision_and_accumulation_type(ranks: int) -> None:
    found = {(case.stage, case.precision, case.accumulate) for case in cases(ranks, rehearse=False)}
    assert found >= {(stage, "bf16", sums) for stage in (1, 2, 3) for sums in ("fp32", "bf16")}
    assert found >= {(stage, "fp32", "fp32") for stage in (1, 2, 3)}


@pytest.mark.rehearsal
@pytest.mark.launch
@pytest.mark.timeout(300)
def test_rehearsal_agrees_with_the_planner(rehearse: Rehearse) -> None:
    rows = rehearse("memory")[0]["cases"]
    assert [row["settings"]["stage"] for row in rows] == [1, 2, 3, 1]
    for row in rows:
        assert row["planned_bytes"] == pytest.approx(row["live_bytes"], rel=0.15)
        if row["mem_tracker_bytes"] is not None:
            assert row["mem_tracker_bytes"] == pytest.approx(row["live_bytes"], rel=0.01)
