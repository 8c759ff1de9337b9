"""Bytes a parameter of weights, gradients and optimizer; `benchmarks.memory` measures them."""

from typing import Any

import pytest

from inheritune_ds.plan.model_size import tensors
from inheritune_ds.plan.zero_memory import States, Tensors, kept_gathered, states
from tests.plan.test_memory import OPENLLAMA_3B, layout

COUNT = 1_815_638_400
OFFLOAD = {"offload_optimizer": True, "offload_parameters": True}
STUDENT = tensors(OPENLLAMA_3B, 13)
HIDDEN_SQUARED = 3200 * 3200
DECAYED = STUDENT.largest_group / COUNT


def found(accumulation: int = 8, **changes: Any) -> States:
    return states(STUDENT, layout(**{"reduce_bucket_size": HIDDEN_SQUARED, **changes}), accumulation=accumulation)


def per_parameter(*parts: dict[str, float]) -> float:
    """Bytes per parameter without communication buffers."""
    return sum(size for part in parts for name, size in part.items() if name != "communication buffers") / COUNT


@pytest.mark.parametrize(
    ("changes", "first", "update"),
    [
        ({}, 20, 22 - 2 * (1 - DECAYED)),
        ({"immediate_grad_update": True}, 18, 20 - 2 * (1 - DECAYED)),
        ({"reduce_fp32": True}, 20, 20),
        ({"accumulate_fp32": False}, 16, 16 + 6 * DECAYED),
        ({"precision": "fp32"}, 20, 24),
        ({"zero_stage": 2}, 18, 18),
        ({"zero_stage": 2, "accumulate_fp32": False}, 16, 16 + 6 * DECAYED),
        ({"zero_stage": 3}, 18, 18 + 4 * 1e9 / COUNT),
        ({"zero_stage": 3, "precision": "fp32"}, 20, 20 + 4 * 1e9 / COUNT),
    ],
)
def test_bytes_a_parameter_on_one_rank(changes: dict[str, Any], first: float, update: float) -> None:
    at = found(**changes)
    assert per_parameter(at.resident, at.first) == pytest.approx(first)
    assert per_parameter(at.resident, at.update) == pytest.approx(update)


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, 2 + 4 + 2 + 12 / 8),
        ({"accumulate_fp32": False}, 2 + 2 + 12 / 8),
        ({"zero_stage": 2}, 2 + (4 + 12) / 8),
        ({"zero_stage": 3, "max_reuse_distance": 10**10}, 2 + (2 + 4 + 12) / 8),
    ],
)
def test_bytes_a_parameter_on_eight_ranks(changes: dict[str, Any], first: float) -> None:
    at = found(world_size=8, **changes)
    assert per_parameter(at.resident, at.first) == pytest.approx(first)


def test_a_small_model_is_reduced_in_one_call_that_copies_all() -> None:
    small = Tensors([80, 300, 100], [False, True, True])
    at = states(small, layout(), accumulation=1)
    assert at.update["copies"] == 480 * (4 + 2)
    assert at.first == {}
    assert at.last["gradients"] == 480 * 2


def test_zero_3_keeps_parameters_within_the_reuse_distance() -> None:
    assert kept_gathered(layout()) == 500_000_000
    at = found(zero_stage=3, world_size=2)
    assert at.first["gathered weights"] == 2 * (500_000_000 + STUDENT.largest)
    assert "gathered weights" not in found(zero_stage=3).first, "one rank has everything already"


@pytest.mark.parametrize("ranks", [1, 2, 8, 512])
@pytest.mark.parametrize("changes", [{}, {"precision": "fp32"}, OFFLOAD, {"max_reuse_distance": 0}], ids=str)
def test_zero_3_takes_less_to_load_than_to_train(changes: dict[str, Any], ranks: int) -> None:
    at = found(zero_stage=3, world_size=ranks, **changes)
    assert sum(at.load.values()) <= sum(at.resident.values()) + sum(at.first.values())
    small = Tensors([80, 300, 100], [False, True, True])
    load = states(small, layout(zero_stage=3, world_size=ranks, **changes), accumulation=1).load
    del load["communication buffers"]
    element, gathered = (4, 4 * 300) if changes.get("precision") == "fp32" else (2, 2 * 300)
    expected = {"weights": element * 480 / ranks, "gathered weights": gathered * (ranks > 1)}
    if changes is OFFLOAD:
        expected = {"gathered weights": gathered}
    else:
        expected |= {"fp32 master weights": 4 * 480 / ranks, "gradients": 4 * 480 / ranks, "copies": 4 * 400 / ranks}
    assert {part: size for part, size in load.items() if size} == {p: size for p, size in expected.items() if size}


def test_the_bucket_has_deepspeeds_default_size() -> None:
    at = states(STUDENT, layout(zero_stage=3), accumulation=1)
    assert at.resident["communication buffers"] == 2 * 500_000_000
    double = states(STUDENT, layout(zero_stage=2, overlap_comm=True), accumulation=1)
    assert double.going["communication buffers"] == 2 * 2 * 500_000_000


@pytest.mark.parametrize(
    ("changes", "device", "host"),
    [
        ({"zero_stage": 2}, 2, 12 + 4 + 2),
        ({"zero_stage": 3}, 2, 12 + 4 + 4),
        ({"zero_stage": 3, "offload_parameters": True}, 0, 2 + 12 + 4 + 4),
    ],
)
def test_offloading_moves_the_optimizer_to_the_host(changes: dict[str, Any], device: float, host: float) -> None:
    at = found(offload_optimizer=True, **changes)
    kept = {name: size for name, size in at.resident.items() if name not in ("copies", "gathered weights")}
    assert per_parameter(kept) == pytest.approx(device)
    assert at.host / COUNT == pytest.approx(host)
