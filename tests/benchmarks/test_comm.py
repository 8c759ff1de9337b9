"""The count of what the ranks send: DeepSpeed's calls and bytes against the planner's, on two real ranks."""

import pytest

from benchmarks.comm import ACCUMULATIONS, STAGES, verdicts
from tests.benchmarks.conftest import Rehearse


@pytest.mark.rehearsal
@pytest.mark.launch
@pytest.mark.timeout(300)
def test_rehearsal_counts_the_planned_bytes(rehearse: Rehearse) -> None:
    rows = rehearse("comm")[0]["cases"]
    assert [(row["stage"], row["accumulation"]) for row in rows] == [(s, a) for s in STAGES for a in ACCUMULATIONS]
    assert rows[0]["counted"] == rows[1]["counted"] == rows[2]["counted"], "ZeRO-1 reduces once a step"
    reduced = [row["counted"]["all_reduce"][1] for row in rows if row["stage"] == 2]
    assert reduced[2] > 15 * reduced[0], "ZeRO-2 reduces in every micro-step"
    for row in rows:
        assert row["loopback_bytes"] > 0.98 * row["planned_gloo_bytes"], "gloo sends at least that"


def row(stage: int, counted: float, planned: float) -> dict[str, object]:
    kinds = {"all_reduce": [4, counted]}
    return {"case": f"ZeRO-{stage}", "stage": stage, "counted": kinds, "planned": {"all_reduce": [4, planned]}}


def test_verdicts_refuse_an_error_of_3_percent() -> None:
    assert verdicts([row(2, 1000.0, 1015.0)]) == []
    assert verdicts([row(2, 1000.0, 1030.0)]) == ["ZeRO-2: bytes counted 1000, planned 1030"]


def test_verdicts_refuse_zero_1_that_depends_on_the_accumulation() -> None:
    assert verdicts([row(1, 1000.0, 1000.0), row(1, 1001.0, 1000.0)]) == ["ZeRO-1 depends on the accumulation"]
