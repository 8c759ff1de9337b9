"""The judge of steps: spikes, the window, rollbacks."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.campaign.spikes import simulate
from inheritune_ds.checkpoints.train_state import FaultState, TrainState
from inheritune_ds.config.training import Faults
from inheritune_ds.training.faults import FaultGuard, not_finite

NAN, INF = math.nan, math.inf


def guard(spikes: str = "skip", state: FaultState | None = None, **policy: Any) -> FaultGuard:
    return FaultGuard(Faults.model_validate({"spikes": spikes, **policy}), state or FaultState())


def take(judge: FaultGuard, loss: float, grad_norm: float) -> tuple[str | None, str | None]:
    """One step: why its update is skipped, and its log line."""
    fault = judge.judge(loss, grad_norm)
    return fault, judge.note(loss, grad_norm, fault)


def noise(seed: int = 0, *, loss: float = 3.0, grad_norm: float = 0.5) -> Iterator[tuple[float, float]]:
    draw = np.random.default_rng(seed)
    while True:
        yield loss * math.exp(0.02 * draw.normal()), grad_norm * math.exp(0.2 * draw.normal())


def filled(spikes: str = "skip", steps: int = 128, **policy: Any) -> FaultGuard:
    judge = guard(spikes, **policy)
    for _, (loss, grad_norm) in zip(range(steps), noise(), strict=False):
        assert take(judge, loss, grad_norm) == (None, None)
    return judge


@pytest.mark.parametrize("spikes", ["off", "warn", "skip"])
@pytest.mark.parametrize(
    ("loss", "grad_norm", "fault"),
    [
        (NAN, 1.0, "the loss is nan"),
        (INF, NAN, "the loss is inf"),
        (2.0, INF, "the gradient is not finite"),
        (2.0, NAN, "the gradient is not finite"),
    ],
)
def test_numbers_that_are_not_finite_are_a_fault_whatever_the_policy(
    loss: float, grad_norm: float, fault: str, spikes: str
) -> None:
    judge = guard(spikes)
    assert not_finite(loss, grad_norm) == fault
    assert take(judge, loss, grad_norm) == (fault, f"update skipped: {fault}")
    assert judge.state == FaultState(in_a_row=1)
    assert judge.judge(2.0, 1.0) is None


def test_a_spike_is_skipped_and_logged_with_the_limit() -> None:
    judge = filled()
    before = judge.state
    fault = judge.judge(30.0, 0.5)
    assert judge.state == before, "judging keeps the state"
    assert re.fullmatch(r"the loss is 30, more than 3\.\d+ \(6 sigma above the steps before\)", str(fault))
    assert take(judge, 30.0, 0.5) == (fault, f"update skipped: {fault}")
    assert judge.state == FaultState(1, 0, before.losses, before.grad_norms)
    assert str(take(judge, 3.0, 25.0)[0]).startswith("the gradient norm is 25, more than 1.")
    assert re.match("the loss is 30, .* and the gradient norm is 25,", str(take(judge, 30.0, 25.0)[0]))


def test_a_spike_is_only_warned_of_and_hardly_widens_the_window() -> None:
    judge = filled("warn")
    fault, line = take(judge, 30.0, 25.0)
    assert (fault, judge.state.in_a_row) == (None, 0)
    assert str(line).startswith("the loss is 30, more than 3.")
    assert 3.0 < judge.state.losses[-1] < 3.6
    assert 0.5 < judge.state.grad_norms[-1] < 2.5
    assert take(judge, 30.0, 25.0)[1] is not None
    assert take(filled("off"), 30.0, 25.0) == (None, None)


@pytest.mark.parametrize(("loss", "grad_norm"), [(0.3, 0.5), (3.0, 0.001), (0.01, 1e-6)])
def test_what_falls_is_no_spike(loss: float, grad_norm: float) -> None:
    assert filled().judge(loss, grad_norm) is None


def test_a_quarter_of_the_window_must_be_filled() -> None:
    assert filled(steps=31).judge(30.0, 25.0) is None
    assert filled(steps=32).judge(30.0, 25.0) is not None


def test_steps_that_hardly_differ_are_not_the_measure() -> None:
    judge = guard()
    for _ in range(64):
        take(judge, 3.0, 0.5)
    assert judge.judge(3.0 * 1.05, 0.5 * 1.3) is None
    assert judge.judge(3.0 * 1.07, 0.5) is not None
    assert judge.judge(3.0, 0.5 * 1.4) is not None


def test_a_steady_climb_is_a_trend() -> None:
    """The norm doubles every 16 steps, as while a learning rate warms up; fifty times it is still a spike."""
    judge = guard()
    for step, (loss, grad_norm) in zip(range(256), noise(), strict=False):
        assert take(judge, loss, grad_norm * 2.0 ** (step / 16)) == (None, None)
    assert judge.judge(3.0, 50 * 0.5 * 2.0**16) is not None


def test_steps_without_a_logarithm_do_not_enter_the_window() -> None:
    judge = filled(steps=40)
    before = judge.state
    assert take(judge, 0.0, 0.0) == (None, None)  # a batch without a counted token
    assert judge.state == before


@pytest.mark.parametrize("spikes", ["skip", "warn"])
def test_a_loss_scale_that_was_too_large_is_logged_and_is_no_fault(spikes: str) -> None:
    judge = filled(spikes)
    norms = judge.state.grad_norms
    judge.state = replace(judge.state, in_a_row=2)
    line = judge.note(3.0, INF, None)
    assert line == "update skipped: the loss scale was too large for fp16, and is lowered"
    assert (judge.state.in_a_row, judge.state.losses[-1], judge.state.grad_norms) == (0, 3.0, norms)


def test_the_run_rolls_back_after_faults_in_a_row_only() -> None:
    judge = guard(rollback_after=2)
    seen = []
    for loss in (NAN, 3.0, NAN, NAN):
        take(judge, loss, 1.0)
        seen.append((judge.state.in_a_row, judge.must_roll_back))
    assert seen == [(1, False), (0, False), (1, False), (2, True)]


def test_a_lasting_shift_is_a_row_of_spikes_if_they_are_skipped() -> None:
    judge = filled(rollback_after=3)
    for loss, grad_norm in (next(noise(step, loss=6.0)) for step in range(3)):
        assert take(judge, loss, grad_norm)[0] is not None
    assert judge.must_roll_back


def test_a_lasting_shift_becomes_normal_if_it_is_warned_of() -> None:
    judge = filled("warn")
    lines = [
        take(judge, loss, grad_norm)[1] for _, (loss, grad_norm) in zip(range(60), noise(1, loss=6.0), strict=False)
    ]
    assert lines[0] is not None
    assert not any(lines[20:])


@pytest.mark.parametrize("spikes", ["warn", "skip"])
def test_decisions_are_the_same_after_a_resume(spikes: str) -> None:
    """The state goes through JSON in the middle of it."""
    straight, resumed = guard(spikes), guard(spikes)
    for step, (loss, grad_norm) in zip(range(300), noise(3), strict=False):
        given = (loss * (10 if step % 41 == 40 else 1), grad_norm * (50 if step % 53 == 52 else 1))
        if step % 7 == 0:
            saved = TrainState(step=step, faults=resumed.state).as_dict()
            resumed = guard(spikes, TrainState.of(json.loads(json.dumps(saved))).faults)
        assert take(straight, *given) == take(resumed, *given)
        assert straight.state == resumed.state
    assert len(straight.state.losses) == 128


def test_the_window_is_as_long_as_the_recipe_says() -> None:
    judge = filled(steps=50, window_steps=20)
    assert len(judge.state.losses) == len(judge.state.grad_norms) == 20


@pytest.mark.parametrize("kind", ["calm", "usual"])
def test_spikes_are_caught_and_noise_is_not(kind: str) -> None:
    """Short form of the campaign's 10,000 steps."""
    found = simulate(kind, seed=1, steps=2000)
    assert found["injected"] >= 15
    assert found["caught"] == found["injected"]
    assert found["false"] == 0
