"""Learning rate as a pure function of the step."""

import math

from inheritune_ds.recipe import Schedule


def lr_ratio(schedule: Schedule, step: int, total_steps: int) -> float:
    """Share of the peak learning rate that update number `step` uses.

    The warm-up is linear and its first update already moves: step 0 uses 1 / (warmup_steps + 1). After
    it, cosine falls along half a period to `min_lr_ratio`, which the last update (total_steps - 1)
    reaches; wsd stays at 1 and falls linearly to `min_lr_ratio` over its last `decay_ratio * total_steps`
    updates; constant stays at 1.

    Args:
        schedule: Kind and its settings.
        step: 0-based number of the optimizer update, below total_steps.
        total_steps: Updates of the whole run.

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
        start = max(start, total_steps - round(schedule.decay_ratio * total_steps))
    if step < start:
        return 1.0
    span = total_steps - 1 - start
    progress = (step - start) / span if span > 0 else 1.0
    fall = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1.0 - progress
    return schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * fall
