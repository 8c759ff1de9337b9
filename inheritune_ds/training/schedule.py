"""Learning rate as a pure function of the step."""

import math

from inheritune_ds.config.training import Schedule


def lr_ratio(schedule: Schedule, step: int, total_steps: int) -> float:
    """Share of the peak learning rate in update `step` (from 0) of n = `total_steps`.

    Warm-up, for step < w = warmup_steps: (step + 1) / (w + 1), so the first update is not zero. After it the ratio is
    m + (1 - m) f with m = min_lr_ratio and f from 1 at update w to 0 at the last one, n - 1:

    - cosine: f = (1 + cos(pi (step - w) / (n - 1 - w))) / 2.
    - wsd: f = 1, then linear in the last d = round(decay_ratio n) updates, f = (n - 1 - step) / d; d is at most
      n - 1 - w, so that one update is at the peak. All d updates are below the peak.
    - constant: the ratio is 1 to the end.

    The last update of cosine and wsd has the ratio m: with 0, it changes nothing.

    Source: linear warm-up and cosine as in nanoGPT's train.py (commit 3adf61e), get_lr; wsd: Hu et al.
    2024 (MiniCPM), section 4.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} is outside 0 .. {total_steps - 1}")
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    if schedule.kind == "constant":
        return 1.0
    start = schedule.warmup_steps
    if schedule.kind == "wsd":
        start = max(start, total_steps - 1 - round(schedule.decay_ratio * total_steps))  # the last at the peak
        if step <= start:
            return 1.0
    span = total_steps - 1 - start
    progress = (step - start) / span if span > 0 else 1.0
    fall = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1.0 - progress
    return schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * fall
