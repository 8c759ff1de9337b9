"""The prediction of step times: its arithmetic, and that its parts run on real ranks."""

import os

import pytest

from benchmarks.predict import LARGE_BYTES, REHEARSAL, SMALL_BYTES, launched, link_of, predict
from inheritune_ds.config.zero import ZeroSettings
from inheritune_ds.plan.model_size import flops_per_token, parameters
from tests.plan.test_memory import layout

RATES = {"flops_per_s": 1e9, "update_s_a_parameter": 1e-9, "small_s": 0.0, "large_s": 1.0}


def taken(ranks: int) -> ZeroSettings:
    return layout(precision="fp32", world_size=ranks, reduce_bucket_size=4096)


@pytest.mark.parametrize("ranks", [2, 4])
def test_link_of_fits_both_messages(ranks: int) -> None:
    wire = 2 * (ranks - 1) / ranks
    messages = {2: 2, 4: 4}[ranks]
    seconds = {
        name: messages * 3e-5 + wire * size / 5e8 for name, size in (("small_s", SMALL_BYTES), ("large_s", LARGE_BYTES))
    }
    link = link_of(seconds, ranks)
    assert link.bytes_per_s == pytest.approx(5e8)
    assert link.latency_s == pytest.approx(3e-5)


def test_predict_adds_passes_and_optimizer_on_one_rank() -> None:
    case = REHEARSAL.case(1)
    found = predict(REHEARSAL, 1, taken(1), RATES, {})
    assert found["passes_s"] == pytest.approx(
        REHEARSAL.windows * case.seq_len * flops_per_token(case.shape, case.blocks, case.seq_len) / 1e9
    )
    assert found["optimizer_s"] == pytest.approx(parameters(case.shape).total * 1e-9)
    assert found["communication_s"] == 0.0
    assert found["step_s"] == pytest.approx(found["passes_s"] + found["optimizer_s"])


def test_predict_shares_cores_among_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    alone = {**RATES, "flops_per_s": 2e9}
    two, four = (predict(REHEARSAL, ranks, taken(ranks), alone, RATES) for ranks in (2, 4))
    assert four["passes_s"] == pytest.approx(two["passes_s"]), "half the work each, at half the rate"
    assert four["optimizer_s"] == pytest.approx(two["optimizer_s"])
    assert four["communication_s"] > 2 * two["communication_s"] > 0.0


@pytest.mark.thorough
@pytest.mark.launch
@pytest.mark.timeout(300)
def test_launched_calibrates_and_measures_on_two_ranks() -> None:
    rates = launched("calibrate", 2, rehearse=True)
    assert rates.keys() == RATES.keys()
    assert 0.0 < rates["small_s"] < rates["large_s"]
    found = launched("measure", 2, rehearse=True)
    assert found["step_s"] > 0.0
    assert (found["layout"]["world_size"], found["layout"]["precision"]) == (2, "fp32")
