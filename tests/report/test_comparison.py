import math
import statistics
from typing import Any

import pytest

from inheritune_ds.data.window_losses import student_t
from inheritune_ds.errors import RunFolderError
from inheritune_ds.report.comparison import Arm, paired_difference
from tests.report.runs import ON_THIS_TEXT, STUDENT, arm, evaluation, losses


def test_paired_difference_is_computed_by_document() -> None:
    a, b = losses(4.0), losses(4.5, tilt=0.05)
    per_document = [x - y for x, y in zip(a, b, strict=True)]
    error = statistics.stdev(per_document) / 4
    difference = paired_difference(arm("a", evaluation(a)), arm("b", evaluation(b)))
    found, mean = difference.found, statistics.fmean(per_document)
    assert found.mean == pytest.approx(mean, rel=1e-12)
    assert found.stderr == pytest.approx(error, rel=1e-9)
    assert found.interval == pytest.approx((mean - STUDENT * error, mean + STUDENT * error), rel=1e-5)
    assert found.documents == 16
    assert (difference.over_seeds, difference.words) == (False, ON_THIS_TEXT)


def test_paired_difference_weighs_documents_by_their_tokens() -> None:
    tokens = [30, 0, 40, 30]
    a = arm("a", evaluation([2.0, 0.0, 1.0, 4.0], tokens))
    b = arm("b", evaluation([1.5, 0.0, 1.0, 3.5], tokens))
    assert paired_difference(a, b).found.mean == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("of", "to", "given"), [(1, 1, False), (2, 3, False), (3, 2, False), (1, 1, True), (2, 1, True)]
)
def test_fewer_than_three_seeds_state_no_order_and_leave_the_seeds_out(of: int, to: int, given: bool) -> None:  # noqa: FBT001
    a = arm("a", *(evaluation(losses(3.0 + 0.01 * seed)) for seed in range(of)))
    b = arm("b", *(evaluation(losses(4.0 + 0.01 * seed, tilt=0.05)) for seed in range(to)), given=given)
    found = paired_difference(a, b)
    alone = paired_difference(arm("a", evaluation(losses(3.0))), arm("b", evaluation(losses(4.0, tilt=0.05))))
    assert found.words == ON_THIS_TEXT
    assert found.found.stderr == pytest.approx(alone.found.stderr)


def test_three_seeds_add_their_variance_to_the_interval() -> None:
    levels = ((4.0, 4.1, 4.3), (4.6, 4.5, 4.45, 4.7))
    a, b = (
        arm(label, *(evaluation(losses(level, tilt=tilt)) for level in given))
        for label, given, tilt in zip("ab", levels, (0.01, 0.05), strict=True)
    )
    documents = statistics.variance([-0.04 * (-1) ** index for index in range(16)]) / 16
    first, second = (statistics.variance(given) / len(given) for given in levels)
    total = documents + first + second
    dof = total**2 / (documents**2 / 15 + first**2 / 2 + second**2 / 3)
    difference = paired_difference(a, b)
    found, mean = difference.found, statistics.fmean(levels[0]) - statistics.fmean(levels[1])
    assert difference.over_seeds
    assert found.mean == pytest.approx(mean)
    assert found.stderr == pytest.approx(math.sqrt(total))
    half = student_t(dof) * math.sqrt(total)
    assert found.interval == pytest.approx((mean - half, mean + half))
    assert difference.words == "below, over seeds and documents"


@pytest.mark.parametrize(
    ("level", "words"),
    [
        (3.0, "below, over seeds and documents"),
        (5.0, "above, over seeds and documents"),
        (4.0, "no clear difference: the interval includes 0"),
    ],
)
def test_an_order_is_stated_over_seeds_against_a_given_reference(level: float, words: str) -> None:
    a = arm("a", *(evaluation(losses(level + shift)) for shift in (-0.05, 0.0, 0.05)))
    assert paired_difference(a, arm("b", evaluation(losses(4.0, tilt=0.05)), given=True)).words == words


def test_runs_of_one_recipe_as_two_arms_of_one_seed_are_not_ordered() -> None:
    """Three runs that differ in the seed alone were once "below by 3.7" and "by 4.1 standard errors"."""
    runs = [arm(str(seed), evaluation(losses(4.0 + 0.02 * seed, tilt=0.01 * seed))) for seed in range(3)]
    for of in runs:
        for to in runs:
            assert paired_difference(of, to).words == ON_THIS_TEXT


@pytest.mark.parametrize(("dominant", "words"), [(14, "too few"), (1, "below")])
def test_few_effective_documents_state_no_order(dominant: int, words: str) -> None:
    tokens = [128 * dominant, *[128] * 15]
    a = arm("a", *(evaluation(losses(3.0 + 0.01 * seed), tokens) for seed in range(3)))
    b = arm("b", *(evaluation(losses(4.0 + 0.01 * seed, tilt=0.05), tokens) for seed in range(3)))
    assert paired_difference(a, b).words.startswith(words)


def test_one_document_has_no_interval() -> None:
    a, b = (arm(label, evaluation([loss])) for label, loss in (("a", 1.0), ("b", 2.0)))
    found = paired_difference(a, b)
    assert (found.found.mean, found.found.interval) == (-1.0, None)
    assert found.words == "no interval: fewer than 2 effective documents"


@pytest.mark.parametrize(
    ("windows", "text", "problem"),
    [
        ([1.0, 2.0, 3.0], {}, "on 2 windows and b on 3 windows: they cannot be compared"),
        ([1.0, 2.0], {"tokens_sha256": "b" * 64}, "on the text aaaaaaaaaaaa and b on the text bbbbbbbbbbbb: they"),
        ([1.0, 2.0], {"seq_len": 64}, "on windows of 128 tokens and b on windows of 64 tokens: they cannot"),
        ([1.0, 2.0], {"tokens": [128, 127]}, "on 256 targets of 2 documents and b on 255 targets of 2 documents: they"),
    ],
)
def test_paired_difference_refuses_other_windows(windows: list[float], text: dict[str, Any], problem: str) -> None:
    one, other = arm("a", evaluation([1.0, 2.0])), arm("b", evaluation(windows, **text))
    message = rf"^a was validated {problem}.*\n  allowed: .*corpus.max_tokens.*\n  do: make these equal"
    with pytest.raises(RunFolderError, match=message):
        paired_difference(one, other)


def test_paired_difference_refuses_another_precision() -> None:
    one = arm("a", evaluation([1.0, 2.0]))
    with pytest.raises(
        RunFolderError, match=r"^a was validated in fp32 and b in bf16: they cannot be compared\n.*one prec"
    ):
        paired_difference(one, Arm("b", "bf16", one.evaluations))
