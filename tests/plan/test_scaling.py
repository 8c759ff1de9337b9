"""Seconds of a step, and how they scale."""

from itertools import pairwise
from typing import Any

import pytest

from inheritune_ds.plan.gpus import gpu
from inheritune_ds.plan.model_size import flops_per_token
from inheritune_ds.plan.scaling import SCALES, Job, link_between, scaled, sent_gb
from tests.plan.test_memory import GPT2_MEDIUM, OPENLLAMA_3B, layout

A6000, H200 = gpu("a6000"), gpu("h200")


def job(micro_batch_size: int = 2, accumulation: int = 32, **changes: Any) -> Job:
    common = {"reduce_bucket_size": 3200 * 3200, "persistence_threshold": 32_000}
    return Job(OPENLLAMA_3B, 13, layout(**{**common, **changes}), micro_batch_size, accumulation, batch_windows=64)


@pytest.mark.parametrize(("card", "tokens_a_s"), [("a6000", 6_848), ("a100-80", 13_803), ("h200", 43_754)])
def test_rate_of_one_gpu_is_mfu_times_peak(card: str, tokens_a_s: float) -> None:
    assert scaled(job(), gpu(card), 0.5, 1).strong_rate == pytest.approx(tokens_a_s, rel=1e-3)


def test_compute_takes_the_flops_of_the_tokens() -> None:
    flops = 64 * 2048 * flops_per_token(OPENLLAMA_3B, 13, 2048)
    assert job().compute_s(64, A6000, 0.4) == pytest.approx(flops / (154.8e12 * 0.4))


def test_efficiencies_are_relative_to_one_gpu() -> None:
    alone = scaled(job(), A6000, 0.5, 1)
    assert (alone.strong_s, alone.strong_efficiency, alone.weak_efficiency) == (0.0, 1.0, 1.0)
    rates = [scaled(job(), H200, 0.5, gpus) for gpus in SCALES]
    assert all(later.weak_rate < earlier.weak_rate for earlier, later in pairwise(rates))
    assert all(at.weak_efficiency == pytest.approx(at.weak_rate / rates[0].weak_rate) for at in rates)


def test_strong_scaling_divides_the_batch_or_has_no_figures() -> None:
    assert [job().cut(gpus) for gpus in (1, 4, 32, 64)] == [(2, 32), (2, 8), (2, 1), (1, 1)]
    assert job().cut(3) is None
    beyond = scaled(job(), H200, 0.5, 128)
    assert (beyond.cut, beyond.strong_s, beyond.strong_rate, beyond.strong_efficiency) == (None, None, None, None)
    assert 0.5 < beyond.weak_efficiency < 1.0


def test_the_papers_batch_is_too_small_for_sixteen_gpus() -> None:
    """GPT-2 medium with 16 blocks, 49,152 tokens a step: 94 % on 8 A100, far less over two nodes of H100."""
    small = Job(GPT2_MEDIUM, 16, layout(seq_len=1024), 6, 1, batch_windows=48)
    within, across = scaled(small, gpu("a100-80"), 0.5, 8), scaled(small, gpu("h100"), 0.5, 16)
    assert within.strong_efficiency == pytest.approx(67.7 / (67.7 + 5.9), abs=0.01)
    assert across.strong_efficiency is not None
    assert across.strong_efficiency < 0.8


def test_links_across_nodes_are_slower() -> None:
    assert link_between(A6000, 8).bytes_per_s == 12e9
    assert link_between(A6000, 16).bytes_per_s == 10e9
    assert link_between(H200, 16).bytes_per_s < link_between(H200, 8).bytes_per_s


def test_only_zero_3_with_overlap_hides_communication() -> None:
    def efficiency(**changes: Any) -> float:
        return scaled(job(1, 8, **changes), H200, 0.5, 8).weak_efficiency

    assert efficiency(zero_stage=3, overlap_comm=True) > efficiency(zero_stage=3)
    assert efficiency(zero_stage=1, overlap_comm=True) == efficiency(zero_stage=1)


def test_zero_2_sends_more_the_more_it_accumulates() -> None:
    two = job(2, 8, zero_stage=2, world_size=4)
    assert sent_gb(two, 4) == pytest.approx((2 * 8 + 1) / (2 + 1) * sent_gb(two, 4, zero_stage=1), rel=1e-3)
