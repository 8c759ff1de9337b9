import math
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inheritune_ds.data.window_losses import Floats, Pieces, Spread, estimate, student_t


def floats(*values: float) -> Floats:
    return np.array(values, dtype=np.float64)


@pytest.mark.parametrize(
    ("dof", "quantile"),  # of printed tables; the last is the normal distribution's
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (6.5, 2.4020), (10, 2.2281), (30, 2.0423), (1e7, 1.9600)],
)
def test_student_t_is_that_of_the_tables(dof: float, quantile: float) -> None:
    assert student_t(dof) == pytest.approx(quantile, abs=1e-4)


def test_documents_of_equal_length_have_the_plain_mean_standard_error_and_interval() -> None:
    values = [1.0, 2.5, 3.0, 7.0]
    found = estimate(10.0 * floats(*values), floats(10, 10, 10, 10))
    mean, error = statistics.fmean(values), statistics.stdev(values) / 2.0
    assert [found.mean, found.stderr] == pytest.approx([mean, error])
    assert found.interval == pytest.approx((mean - 3.18245 * error, mean + 3.18245 * error), abs=1e-4)
    assert [found.documents, found.effective_documents] == pytest.approx([4, 4.0])


def test_unequal_documents_weigh_by_their_tokens() -> None:
    tokens, means = floats(60, 20, 10, 10), floats(1.0, 2.0, 3.0, 5.0)
    found = estimate(means * tokens, tokens)
    mean = 0.6 * 1.0 + 0.2 * 2.0 + 0.1 * 3.0 + 0.1 * 5.0
    shares = [0.6, 0.2, 0.1, 0.1]
    squares = [(share * (value - mean)) ** 2 / (1 - share) for share, value in zip(shares, means.tolist(), strict=True)]
    assert found.mean == pytest.approx(mean)
    assert found.stderr == pytest.approx(math.sqrt(sum(squares)))
    assert found.effective_documents == pytest.approx(1 / 0.42)
    assert found.interval is not None
    half = student_t(1 / 0.42 - 1) * math.sqrt(sum(squares))
    assert found.interval == pytest.approx((mean - half, mean + half))


@given(cuts=st.lists(st.integers(1, 99), max_size=20, unique=True))
def test_the_windows_that_cut_documents_do_not_count(cuts: list[int]) -> None:
    documents = np.repeat(np.arange(5), 20)
    losses = np.sin(np.arange(100.0))
    ends = sorted({*cuts, 20, 40, 60, 80, 100})
    starts = [0, *ends[:-1]]
    pieces = Pieces(
        windows=tuple(range(len(starts))),
        documents=tuple(int(documents[start]) for start in starts),
        tokens=tuple(end - start for start, end in zip(starts, ends, strict=True)),
        losses=tuple(float(losses[start:end].sum()) for start, end in zip(starts, ends, strict=True)),
    )
    whole = estimate(losses.reshape(5, 20).sum(axis=1), np.full(5, 20.0))
    found = pieces.estimate()
    assert [found.mean, found.stderr] == pytest.approx([whole.mean, whole.stderr])


def test_documents_without_counted_targets_are_none() -> None:
    found = estimate(floats(2, 0, 4, 5), floats(2, 0, 2, 2))
    assert found == estimate(floats(2, 4, 5), floats(2, 2, 2))
    assert found.documents == 3


@pytest.mark.parametrize("tokens", [(100.0,), (80.0, 10.0, 10.0)])
def test_fewer_than_two_effective_documents_have_no_interval(tokens: tuple[float, ...]) -> None:
    found = estimate(floats(*tokens) * 3.0, floats(*tokens))
    assert found.mean == pytest.approx(3.0)
    assert (found.stderr, found.interval) == (None, None)


def test_equal_documents_have_an_interval_of_one_point() -> None:
    found = estimate(floats(2, 2, 2, 2), floats(1, 1, 1, 1))
    assert (found.stderr, found.interval) == (0.0, (2.0, 2.0))


@pytest.mark.parametrize(
    ("seeds", "variance", "dof"),
    [
        ([Spread(1e9, 2.0)], 1e9, 2.0),  # the seeds alone
        ([Spread(1e-9, 2.0)], 1.0, 9.0),  # the documents alone
        ([Spread(1.0, 2.0)], 2.0, 4.0 / (1 / 9 + 1 / 2)),
        ([Spread(1.0, 2.0), Spread(2.0, 4.0)], 4.0, 16.0 / (1 / 9 + 1 / 2 + 4 / 4)),
    ],
)
def test_seeds_add_variance_and_satterthwaite_adds_degrees_of_freedom(
    seeds: list[Spread], variance: float, dof: float
) -> None:
    losses = np.arange(10.0)
    losses *= math.sqrt(10.0) / statistics.stdev(losses.tolist())  # so that the documents' variance is 1
    found: Any = estimate(losses, np.ones(10), seeds)
    assert found.stderr**2 == pytest.approx(variance, rel=1e-6)
    assert (found.interval[1] - found.mean) / found.stderr == pytest.approx(student_t(dof), rel=1e-6)


@pytest.mark.parametrize("dominant", [0.0, 0.35])
def test_standard_error_matches_many_draws(dominant: float) -> None:
    draw = np.random.default_rng(0)

    def sample() -> tuple[float, float]:
        tokens = draw.lognormal(0.0, 1.0, 60)
        if dominant:
            tokens[0] = dominant / (1 - dominant) * tokens[1:].sum()
        found: Any = estimate(tokens * (5.0 + draw.normal(0.0, 1.0, 60)), tokens)
        return found.mean, found.stderr**2

    means, squares = zip(*[sample() for _ in range(4000)], strict=True)
    # With a dominant document CR2 is too small still, since its residual is small: Student's quantile covers the rest.
    low, high = (0.95, 1.06) if not dominant else (0.78, 0.9)
    assert low < math.sqrt(statistics.fmean(squares)) / statistics.stdev(means) < high
