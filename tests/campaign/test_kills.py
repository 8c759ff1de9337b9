"""SIGKILL: one run, killed in a save and between two, and what the campaign's checks find."""

from collections import Counter

import pytest

from benchmarks.campaign.kills import IN_SAVE_AT_LEAST, PARTS, Kind, check_start, draw_kills


def test_full_form_has_100_kills_of_which_40_must_hit_a_save() -> None:
    chains = [case for part in PARTS for name, case in part.cases.items() if name not in part.short]
    kinds = [kind for chain in chains for kind in chain.keywords["kinds"]]  # type: ignore[attr-defined]
    assert len(kinds) == 100
    assert len(chains) * IN_SAVE_AT_LEAST >= 40
    assert Counter(chain.keywords["asynchronous"] for chain in chains) == {True: 5, False: 5}  # type: ignore[attr-defined]
    assert sorted(chain.keywords["seed"] for chain in chains) == list(range(10))  # type: ignore[attr-defined]


def test_draw_kills_depends_on_the_seed_alone() -> None:
    kinds: tuple[Kind, ...] = ("save", "step", "start")
    assert draw_kills(3, kinds) == draw_kills(3, kinds)
    assert draw_kills(3, kinds) != draw_kills(4, kinds)
    assert {kill.rank for seed in range(20) for kill in draw_kills(seed, kinds)} == {None, 0, 1}


@pytest.mark.parametrize(
    ("output", "kept", "problem"),
    [
        ("resumed from runs/tiny/checkpoints/step-00000004 (step 4, 2,048 tokens)", 8, "resumed from step 4, not 8"),
        ("step 0: val loss 5.7", 8, "started over at step 8"),
    ],
)
def test_check_start_refuses_another_checkpoint(output: str, kept: int, problem: str) -> None:
    with pytest.raises(AssertionError, match=problem):
        check_start(output, kept)


def test_check_start_accepts_the_newest_checkpoint() -> None:
    check_start("resumed from runs/tiny/checkpoints/step-00000004 (step 4, 2,048 tokens)", 4)
    check_start("step 0: val loss 5.7", 0)
    check_start("killed before it came so far", 8)
