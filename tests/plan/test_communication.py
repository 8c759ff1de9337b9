"""Calls, bytes and seconds of one step's collectives; `benchmarks.comm` holds them against DeepSpeed."""

from typing import Any

import pytest

from inheritune_ds.plan.communication import Link, Transfer, transfers
from inheritune_ds.plan.model_size import tensors
from inheritune_ds.plan.zero_memory import Tensors
from tests.plan.test_memory import GPT2_MEDIUM, OPENLLAMA_3B, layout

COUNT = 1_815_638_400
STUDENT = tensors(OPENLLAMA_3B, 13)


def sent(accumulation: int = 1, ranks: int = 8, **changes: Any) -> dict[str, Transfer]:
    common = {"world_size": ranks, "reduce_bucket_size": 3200 * 3200, "persistence_threshold": 32_000}
    found = transfers(STUDENT, layout(**{**common, **changes}), accumulation=accumulation)
    return {part.what: part for part in found}


def per_parameter(found: dict[str, Transfer], ranks: int = 8) -> float:
    return sum(part.wire_bytes(ranks) for part in found.values()) / COUNT


def test_one_rank_sends_nothing() -> None:
    assert transfers(STUDENT, layout(), accumulation=4) == ()


@pytest.mark.parametrize("changes", [{}, {"accumulate_fp32": False}, {"precision": "fp32"}])
def test_zero_1_sends_the_same_for_every_accumulation(changes: dict[str, Any]) -> None:
    assert sent(1, **changes) == sent(4, **changes) == sent(16, **changes)


@pytest.mark.parametrize(
    ("accumulation", "changes", "bytes_a_parameter"),
    [
        (1, {}, 2 * 2 + 2),
        (16, {}, 2 * 2 + 2),
        (1, {"reduce_fp32": True}, 2 * 4 + 2),
        (1, {"precision": "fp32"}, 2 * 4 + 4),
        (1, {"zero_stage": 2}, 2 * 2 + 2),
        (16, {"zero_stage": 2}, 16 * 2 * 2 + 2),
        (1, {"zero_stage": 3, "max_reuse_distance": 10**10}, 2 + 2),
        (16, {"zero_stage": 3, "max_reuse_distance": 10**10}, 16 * (2 + 2)),
        (1, {"zero_stage": 3, "max_reuse_distance": 0}, 2 + 2 + 2),
    ],
)
def test_bytes_on_the_wire_a_parameter(accumulation: int, changes: dict[str, Any], bytes_a_parameter: float) -> None:
    assert per_parameter(sent(accumulation, **changes)) == pytest.approx(bytes_a_parameter * 7 / 8, rel=1e-3)


def test_zero_3_gathers_parameters_beyond_the_reuse_distance_twice() -> None:
    once = sent(zero_stage=3, max_reuse_distance=10**10)["weights"]
    default = sent(zero_stage=3)["weights"]
    assert default.payload_bytes - once.payload_bytes == pytest.approx(2 * (COUNT - 5e8), rel=0.02)
    assert default.calls > once.calls == len(STUDENT.sizes)


def test_calls_follow_the_bucket() -> None:
    small = Tensors([10, 4, 4, 4, 30, 2], [False, True, True, True, True, False])
    changes: Any = {"zero_stage": 1, "accumulate_fp32": False, "world_size": 2}

    def calls(bucket: int) -> int:
        return transfers(small, layout(**changes, reduce_bucket_size=bucket), accumulation=1)[0].calls

    # decayed 4, 4, 4, 30 then 10, 2: [4 4 4] [30] [10 2]; the second rank's share starts within the 30, at its 9th
    assert calls(12) == 3
    assert calls(8) == 1 + 1 + 1 + 1 + 1 + 1  # [4 4] [4] [9 of 30] [21 of 30] [10] [2]
    assert calls(100) == 1


def test_bf16_optimizer_reduces_a_large_model_in_one_call_a_group() -> None:
    assert sent()["gradients"].calls == 2
    assert transfers(tensors(GPT2_MEDIUM, 16), layout(world_size=2), accumulation=1)[0].calls == 1


def test_wire_bytes_follow_the_ring_and_gloo_reduces_all_to_scatter() -> None:
    reduced = Transfer("gradients", "all_reduce", 1, 800.0)
    scattered = Transfer("gradients", "reduce_scatter", 1, 800.0)
    assert reduced.wire_bytes(4) == 2 * 3 / 4 * 800
    assert scattered.wire_bytes(4) == 3 / 4 * 800
    assert scattered.wire_bytes(4, "gloo") == 2 * 3 / 4 * 800


def test_seconds_add_latency_of_a_tree_or_a_ring_and_bandwidth() -> None:
    link = Link(bytes_per_s=100.0, latency_s=1.0)
    assert link.seconds([Transfer("x", "all_reduce", 3, 400.0)], 8) == 3 * 2 * 3 + 2 * 7 / 8 * 4
    assert link.seconds([Transfer("x", "all_gather", 2, 400.0)], 8) == 2 * 7 + 7 / 8 * 4
    assert link.seconds([Transfer("x", "all_gather", 2, 400.0)], 1) == 0.0


def test_seconds_of_a_published_example() -> None:
    """GPT-2 medium with 16 blocks over 8 A100 at 235 GB/s: 3.8 ms for two passes of 508 MB, here three."""
    found = transfers(tensors(GPT2_MEDIUM, 16), layout(world_size=8), accumulation=1)
    assert Link(235e9).seconds(found, 8) * 1e3 == pytest.approx(3.78 * 1.5 + 0.26, abs=0.15)
