"""Numerical faults: which updates are skipped, which steps are spikes, when a run rolls back to a checkpoint.

Decisions depend on the loss and the gradient norm of the global batch, which are equal on all ranks to the last bit,
and on a state that is saved with each checkpoint. So all ranks decide alike, and so does a resumed run.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from inheritune_ds.checkpoints.train_state import BatchRange, FaultState, TrainState, batch_of, with_range
from inheritune_ds.config.training import Faults

FILLED_SHARE = 0.25
"""Share of the window that must be filled before spikes are detected: 32 of 128 steps."""
LEAST_NOISE = {"loss": 0.01, "gradient norm": 0.05}
"""Smallest standard deviation of a logarithm: after nearly equal steps any change would be a spike. Six sigma of 0.01
are 6 % of a loss, six of 0.05 are 35 % of a gradient norm."""


def not_finite(loss: float, grad_norm: float) -> str | None:
    """Which number of a step is not finite, in words; None if both are finite."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(grad_norm):
        return "the gradient is not finite"
    return None


class FaultGuard:
    """Judges each step by the steps before it.

    An update with a loss or gradient that is not finite is skipped under every policy. A spike is a loss or a gradient
    norm more than `sigma` standard deviations above the window: the rule of OLMo-core's `optim/skip_step_optimizer.py`
    (6 sigma of 128 steps), with two changes. It applies to logarithms, because norms vary by factors. And the deviation
    is that of the residuals around a fitted line, measured from the higher of the window's mean and the line's next
    value: a loss that falls at the start, or a norm that climbs during the warm-up, is a trend and not noise.

    Under `skip` only accepted steps enter the window, so a lasting shift of the loss is a sequence of spikes: it ends
    in a rollback that skips the data. Under `warn` a spike enters the window clipped to its limit: one spike hardly
    widens the window, and a lasting shift becomes normal within some steps.
    """

    def __init__(self, policy: Faults, state: FaultState) -> None:
        self._policy = policy
        self.state = state

    @property
    def must_roll_back(self) -> bool:
        """Whether `rollback_after` updates in a row were skipped."""
        return self.state.in_a_row >= self._policy.rollback_after

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Why to skip an update with this loss and gradient norm (as in `StepResult`), or None; keeps the state."""
        fault = not_finite(loss, grad_norm)
        if fault is None and self._policy.spikes == "skip":
            fault = self._spike(loss, grad_norm, self._limits())
        return fault

    def note(self, loss: float, grad_norm: float, fault: str | None) -> str | None:
        """Record a step (as in `StepResult`); returns its log line, or None."""
        if fault is not None:
            self.state = replace(self.state, in_a_row=self.state.in_a_row + 1)
            return f"update skipped: {fault}"
        limits = self._limits() if self._policy.spikes == "warn" else (math.inf, math.inf)
        if not_finite(loss, grad_norm) is not None:
            line: str | None = "update skipped: the loss scale was too large for fp16, and is lowered"
        else:
            line = self._spike(loss, grad_norm, limits)
        self.state = replace(
            self.state,
            in_a_row=0,
            losses=self._with(self.state.losses, loss, limits[0]),
            grad_norms=self._with(self.state.grad_norms, grad_norm, limits[1]),
        )
        return line

    def _spike(self, loss: float, grad_norm: float, limits: tuple[float, float]) -> str | None:
        """The values above their limits, in words; None if there is none."""
        found = [
            f"the {what} is {value:.4g}, more than {limit:.4g}"
            for what, value, limit in zip(LEAST_NOISE, (loss, grad_norm), limits, strict=True)
            if value > limit
        ]
        return f"{' and '.join(found)} ({self._policy.sigma:g} sigma above the steps before)" if found else None

    def _limits(self) -> tuple[float, float]:
        """The largest loss and gradient norm that are no spike."""
        loss, grad_norm = map(self._limit, (self.state.losses, self.state.grad_norms), LEAST_NOISE.values())
        return loss, grad_norm

    def _limit(self, window: Sequence[float], least_noise: float) -> float:
        """The largest value that is no spike; infinite while the window has too few steps."""
        count = len(window)
        if count < max(FILLED_SHARE * self._policy.window_steps, 3):  # a line through two has no residuals
            return math.inf
        logs = [math.log(value) for value in window]
        mean, half = math.fsum(logs) / count, (count - 1) / 2
        slope = 12 * math.fsum((x - half) * y for x, y in enumerate(logs)) / (count * (count * count - 1))
        residuals = math.fsum((y - mean - slope * (x - half)) ** 2 for x, y in enumerate(logs))
        noise = max(math.sqrt(residuals / (count - 2)), least_noise)
        center = mean + max(slope, 0.0) * (count - half)
        return math.exp(min(center + self._policy.sigma * noise, 700.0))  # e^700 is still a float

    def _with(self, window: tuple[float, ...], value: float, limit: float) -> tuple[float, ...]:
        """The window with one more value, clipped to the limit; a value without a logarithm is ignored."""
        return (*window, min(value, limit))[-self._policy.window_steps :] if 0.0 < value < math.inf else window


def faulty_batches(state: TrainState) -> BatchRange:
    """The batches of the skipped updates in a row that end at a state."""
    first = batch_of(state.step - state.faults.in_a_row, state.skipped_batches)
    return first, batch_of(state.step - 1, state.skipped_batches) + 1


def rolled_back(state: TrainState, restored: TrainState) -> TrainState:
    """The state after a rollback to `restored`, which skips the batches of the skipped updates before `state`."""
    first, end = faulty_batches(state)
    # A checkpoint saved between the faults has trained on some of these batches already.
    first = max(first, batch_of(restored.step, state.skipped_batches))
    skipped_batches = with_range(state.skipped_batches, (first, end)) if first < end else state.skipped_batches
    faults = replace(restored.faults, in_a_row=0, rollbacks=state.faults.rollbacks + 1)
    # A validation that was still due there has run since, and its row is kept.
    return replace(restored, skipped_batches=skipped_batches, faults=faults, validation_due=False)
