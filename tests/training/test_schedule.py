import itertools
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from inheritune_ds.config.training import Schedule
from inheritune_ds.training.schedule import lr_ratio

RATIOS = st.floats(0.0, 1.0)
SCHEDULES = st.builds(
    Schedule,
    kind=st.sampled_from(["cosine", "constant", "wsd"]),
    warmup_steps=st.integers(0, 300),
    min_lr_ratio=RATIOS,
    decay_ratio=RATIOS,
)


def curve(schedule: Schedule, total: int) -> list[float]:
    return [lr_ratio(schedule, step, total) for step in range(total)]


@given(schedule=SCHEDULES, total=st.integers(1, 600))
def test_lr_ratio_rises_in_the_warm_up_and_falls_to_its_floor_after_it(schedule: Schedule, total: int) -> None:
    ratios = curve(schedule, total)
    warm, rest = ratios[: schedule.warmup_steps], ratios[schedule.warmup_steps :]
    assert all(before < after for before, after in itertools.pairwise([0.0, *warm, 1.0]))
    assert all(before >= after for before, after in itertools.pairwise([1.0, *rest, schedule.min_lr_ratio - 1e-12]))


@given(schedule=SCHEDULES, total=st.integers(2, 600))
def test_lr_ratio_makes_no_jumps(schedule: Schedule, total: int) -> None:
    ratios = curve(schedule, total)
    decay = round(schedule.decay_ratio * total) if schedule.kind == "wsd" else total
    span = min(decay, total - schedule.warmup_steps - 1)
    assume(span >= 1)
    steepest = math.pi / 2 if schedule.kind == "cosine" else 1.0
    allowed = max(1.0 / (schedule.warmup_steps + 1), steepest * (1 - schedule.min_lr_ratio) / span)
    assert all(abs(a - b) <= allowed + 1e-9 for a, b in itertools.pairwise(ratios))


@given(schedule=SCHEDULES, total=st.integers(1, 600))
def test_lr_ratio_ends_at_its_floor(schedule: Schedule, total: int) -> None:
    assume(schedule.warmup_steps < total)
    assume(schedule.kind != "wsd" or (round(schedule.decay_ratio * total) > 0 and schedule.warmup_steps + 1 < total))
    floor = 1.0 if schedule.kind == "constant" else schedule.min_lr_ratio
    assert lr_ratio(schedule, total - 1, total) == pytest.approx(floor, abs=1e-12)


@given(schedule=SCHEDULES, total=st.integers(302, 600))
def test_lr_ratio_warms_up_on_a_line_that_starts_above_zero(schedule: Schedule, total: int) -> None:
    for step in range(schedule.warmup_steps):
        assert lr_ratio(schedule, step, total) == pytest.approx((step + 1) / (schedule.warmup_steps + 1), rel=1e-15)


def test_cosine_has_its_known_values() -> None:
    schedule = Schedule(kind="cosine", warmup_steps=4, min_lr_ratio=0.1)
    ratios = curve(schedule, 13)
    assert ratios[:4] == [0.2, 0.4, 0.6, 0.8]
    assert ratios[4] == 1.0  # the first update after the warm-up is at the peak
    assert ratios[8] == pytest.approx(0.55, rel=1e-15)  # half way down
    assert ratios[6] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, rel=1e-15)
    assert ratios[12] == 0.1


def test_cosine_is_that_of_nanogpt_but_reaches_its_end() -> None:
    """nanoGPT's get_lr(it) with lr_decay_iters = total - 1, so that the last update has min_lr."""
    warmup, total, peak, floor = 20, 200, 6e-4, 6e-5
    schedule = Schedule(kind="cosine", warmup_steps=warmup, min_lr_ratio=floor / peak)
    for step in range(total):
        if step < warmup:
            expected = peak * (step + 1) / (warmup + 1)
        else:
            decay_ratio = (step - warmup) / (total - 1 - warmup)
            expected = floor + 0.5 * (1.0 + math.cos(math.pi * decay_ratio)) * (peak - floor)
        assert peak * lr_ratio(schedule, step, total) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "ratios"),
    [
        (Schedule(kind="constant", warmup_steps=2, min_lr_ratio=0.1), [1 / 3, 2 / 3, 1.0, 1.0, 1.0]),
        (Schedule(kind="constant"), [1.0, 1.0, 1.0]),
        (Schedule(kind="wsd", warmup_steps=1, min_lr_ratio=0.2, decay_ratio=0.5),
         [0.5, 1.0, 1.0, 1.0, 1.0, 0.84, 0.68, 0.52, 0.36, 0.2]),
        (Schedule(kind="wsd", min_lr_ratio=0.2, decay_ratio=0.0), [1.0, 1.0, 1.0]),
        (Schedule(kind="wsd", warmup_steps=3, min_lr_ratio=0.0, decay_ratio=1.0), [0.25, 0.5, 0.75, 1.0, 0.5, 0.0]),
        (Schedule(kind="cosine", warmup_steps=9), [0.1, 0.2, 0.3]),
        (Schedule(kind="cosine", min_lr_ratio=0.1), [0.1]),
        (Schedule(kind="wsd", min_lr_ratio=0.1), [1.0]),
    ],
)  # fmt: skip
def test_schedules_have_their_known_values(schedule: Schedule, ratios: list[float]) -> None:
    assert curve(schedule, len(ratios)) == pytest.approx(ratios, rel=1e-15)


@given(schedule=SCHEDULES, total=st.integers(1, 600))
def test_wsd_is_below_its_peak_for_the_whole_decay_and_only_then(schedule: Schedule, total: int) -> None:
    wsd = schedule.model_copy(update={"kind": "wsd", "min_lr_ratio": 0.5})
    rest = curve(wsd, total)[wsd.warmup_steps :]
    decay = min(round(wsd.decay_ratio * total), max(len(rest) - 1, 0))
    assert sum(ratio < 1.0 for ratio in rest) == decay
    for number, ratio in enumerate(rest[len(rest) - decay :], 1):
        assert ratio == pytest.approx(1.0 - 0.5 * number / decay, rel=1e-12)


@pytest.mark.parametrize("step", [-1, 5, 6])
def test_lr_ratio_refuses_a_step_outside_the_run(step: int) -> None:
    with pytest.raises(ValueError, match=rf"step {step} is outside 0 \.\. 4"):
        lr_ratio(Schedule(kind="cosine"), step, 5)
