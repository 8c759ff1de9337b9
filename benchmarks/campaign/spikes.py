"""Simulated runs for the spike rule: losses and gradient norms with noise, drift and a warm-up peak, some spoiled."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from inheritune_ds.checkpoints.train_state import FaultState
from inheritune_ds.config.training import Faults
from inheritune_ds.training.faults import FaultGuard

LOSS_FACTOR, NORM_FACTOR = 10.0, 50.0
SPIKE_SHARE = 0.01
"""Of the steps behind the first window."""


@dataclass(frozen=True)
class Noise:
    """Noise of a simulated run.

    Attributes:
        loss: Standard deviation of the logarithm of the loss.
        norm: The same of the gradient norm.
        memory: Correlation of the slow half of it from step to step.
        tail: Degrees of freedom of the norm's draws (Student's t); None: normal.
    """

    loss: float
    norm: float
    memory: float
    tail: float | None = None


KINDS = {
    "calm": Noise(loss=0.005, norm=0.1, memory=0.9),
    "usual": Noise(loss=0.02, norm=0.25, memory=0.9),
    "slow": Noise(loss=0.05, norm=0.25, memory=0.98),
    "heavy": Noise(loss=0.02, norm=0.25, memory=0.9, tail=5.0),
    "rough": Noise(loss=0.03, norm=0.4, memory=0.9),
}


def numbers(noise: Noise, draw: np.random.Generator, steps: int) -> Iterator[tuple[float, float]]:
    """Loss and gradient norm of every step: a falling curve, a peak of the norm in the warm-up, slow waves, a drift."""
    slow = [0.0, 0.0]
    fresh = math.sqrt(1.0 - noise.memory**2)
    for step in range(steps):
        slow = [noise.memory * value + fresh * float(draw.normal()) for value in slow]
        jump = float(draw.normal())
        heavy = jump if noise.tail is None else float(draw.standard_t(noise.tail)) * math.sqrt(1.0 - 2.0 / noise.tail)
        loss = 2.2 + 8.0 * math.exp(-step / 150) + 1.5 / math.sqrt(1.0 + step / 300) + 0.1 * math.sin(step / 500)
        norm = 0.3 + 4.0 * math.exp(-(((step - 100) / 80) ** 2)) + 2.0 * math.exp(-step / 50) + 2e-5 * step
        yield (
            loss * math.exp(noise.loss * (0.6 * slow[0] + 0.8 * jump)),
            norm * math.exp(noise.norm * (0.5 * slow[1] + math.sqrt(0.75) * heavy)),
        )


def simulate(kind: str, *, seed: int, steps: int = 10_000) -> dict[str, Any]:
    """Apply the rule with `spikes: skip` and the recipe's defaults to a run of one of KINDS.

    Returns:
        Numbers of steps: `clean` ones, those of them that the rule took (`false`), spikes `injected` and `caught`.
    """
    draw = np.random.default_rng(seed)
    policy = Faults(spikes="skip")
    guard = FaultGuard(policy, FaultState())
    found = {"clean": 0, "false": 0, "injected": 0, "caught": 0}
    for step, (clean_loss, clean_norm) in enumerate(numbers(KINDS[kind], draw, steps)):
        chance, in_loss = draw.random(), draw.random() < 0.5
        spiked = step >= policy.window_steps and chance < SPIKE_SHARE
        loss = clean_loss * (LOSS_FACTOR if spiked and in_loss else 1.0)
        norm = clean_norm * (NORM_FACTOR if spiked and not in_loss else 1.0)
        fault = guard.judge(loss, norm)
        guard.note(loss, norm, fault)
        found["injected" if spiked else "clean"] += 1
        found["caught" if spiked else "false"] += fault is not None
    return {"kind": kind, "seed": seed, **found}
