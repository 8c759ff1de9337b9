"""Faults of the numbers: which updates are left out, what counts as a spike, when a run goes back to a checkpoint.

Everything here is a function of the loss and the gradient norm of the whole global batch, which all ranks have to the
last bit, and of a state that is saved with each checkpoint. So all ranks decide alike, and a resumed run as if it had
never stopped. Torch is not imported.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from inheritune_ds.checkpoints.train_state import BatchRange, FaultState, TrainState, batch_of, with_range
from inheritune_ds.config.training import Faults

FILLED_SHARE = 0.25
"""Share of the window that must be filled before a spike is told from noise: 32 of 128 steps."""
LEAST_NOISE = {"loss": 0.01, "gradient norm": 0.05}
"""Noise (of the logarithm) is never taken for less: steps that hardly differ would make a spike of every one that
does. Six sigma of 0.01 are 6 % of a loss, of 0.05 they are 35 % of a gradient norm."""


def not_finite(loss: float, grad_norm: float) -> str | None:
    """Why a step is of no use, whatever came before it; None if its numbers are finite."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(grad_norm):
        return "the gradient is not finite"
    return None


class FaultGuard:
    """Judges each step by the steps before it.

    A step whose loss or gradient is not finite is left out whatever the policy. A spike is a loss or a gradient norm
    whose logarithm is more than `sigma` standard deviations above the window's, upwards only: the rule of OLMo-core's
    `optim/skip_step_optimizer.py` (6 sigma of 128 steps), with two changes. The logarithm is judged, because norms
    scatter by factors, not by sums. And the deviation is that of the residuals around a straight line, from whichever
    is higher, the window's mean or the line's next value: a loss that falls at the start, or a norm that climbs while
    the learning rate warms up, is a trend and no noise. Until FILLED_SHARE of the window is filled nothing is a spike.

    Under `skip` only accepted steps enter the window, so a lasting shift of the loss is a row of spikes: it ends in a
    rollback that skips the data, and where that does not help, the recipe's `max_rollbacks` ends the run. Under `warn`
    a spike enters the window as if it had just reached the limit: one alone hardly widens it, and a lasting shift is
    the new normal within some steps. Steps that were left out for a fault never enter it.

    Args:
        policy: The recipe's.
        state: What was remembered up to now.
    """

    def __init__(self, policy: Faults, state: FaultState) -> None:
        self._policy = policy
        self.state = state

    @property
    def must_roll_back(self) -> bool:
        """Whether so many updates were left out in a row that the weights or the data are to blame."""
        return self.state.in_a_row >= self._policy.rollback_after

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Why an update is to be left out, or None; nothing is remembered.

        Args:
            loss: Mean over the global batch, in nats a token.
            grad_norm: Of the whole gradient, before clipping; infinite if an element is not finite.
        """
        fault = not_finite(loss, grad_norm)
        if fault is None and self._policy.spikes == "skip":
            fault = self._spike(loss, grad_norm, self._limits())
        return fault

    def note(self, loss: float, grad_norm: float, fault: str | None) -> str | None:
        """Remember a step; returns a line to print on it, or None if there is nothing to say.

        Args:
            loss: As in `judge`.
            grad_norm: As in `judge`.
            fault: Why the update was left out; None if it was applied, or left out by a loss scale that was too large.
        """
        if fault is not None:
            self.state = replace(self.state, in_a_row=self.state.in_a_row + 1)
            return f"update left out: {fault}"
        limits = self._limits() if self._policy.spikes == "warn" else (math.inf, math.inf)
        if not_finite(loss, grad_norm) is not None:
            line: str | None = "update left out: the loss scale was too large for fp16, and is lowered"
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
        """What is above its limit, in words."""
        found = [
            f"the {what} is {value:.4g}, more than {limit:.4g}"
            for what, value, limit in zip(LEAST_NOISE, (loss, grad_norm), limits, strict=True)
            if value > limit
        ]
        return f"{' and '.join(found)} ({self._policy.sigma:g} sigma above the steps before)" if found else None

    def _limits(self) -> tuple[float, float]:
        """Loss and gradient norm at which a spike begins."""
        least = LEAST_NOISE.values()
        loss, grad_norm = map(self._limit, (self.state.losses, self.state.grad_norms), least)
        return loss, grad_norm

    def _limit(self, window: Sequence[float], least_noise: float) -> float:
        """The value at which a spike begins; infinite while too few steps are remembered."""
        count = len(window)
        if count < max(FILLED_SHARE * self._policy.window_steps, 3):  # a line through two has no residuals
            return math.inf
        logs = [math.log(value) for value in window]
        mean, half = math.fsum(logs) / count, (count - 1) / 2
        slope = 12 * math.fsum((x - half) * y for x, y in enumerate(logs)) / (count * (count * count - 1))
        residuals = math.fsum((y - mean - slope * (x - half)) ** 2 for x, y in enumerate(logs))
        noise = max(math.sqrt(residuals / (count - 2)), least_noise)
        centre = mean + max(slope, 0.0) * (count - half)
        return math.exp(min(centre + self._policy.sigma * noise, 700.0))  # e^700 is still a float

    def _with(self, window: tuple[float, ...], value: float, limit: float) -> tuple[float, ...]:
        """The window with a step more, its value at most the limit; one without a logarithm says nothing of noise."""
        return (*window, min(value, limit))[-self._policy.window_steps :] if 0.0 < value < math.inf else window


def faulty_batches(state: TrainState) -> BatchRange:
    """The batches whose updates were left out one after the other up to a state."""
    first = batch_of(state.step - state.faults.in_a_row, state.skipped_batches)
    return first, batch_of(state.step - 1, state.skipped_batches) + 1


def rolled_back(state: TrainState, restored: TrainState) -> TrainState:
    """The state to resume from after a rollback.

    Args:
        state: After several left-out updates in a row; their batches are skipped from now on.
        restored: Of the checkpoint that the run goes back to.
    """
    first, end = faulty_batches(state)
    # A checkpoint may have been saved between the faults: what it has read already cannot be skipped any more.
    first = max(first, batch_of(restored.step, state.skipped_batches))
    skipped_batches = with_range(state.skipped_batches, (first, end)) if first < end else state.skipped_batches
    faults = replace(restored.faults, in_a_row=0, rollbacks=state.faults.rollbacks + 1)
    # A validation that was still due there has been done since, and its row is kept.
    return replace(restored, skipped_batches=skipped_batches, faults=faults, validation_due=False)
