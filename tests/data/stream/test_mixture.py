from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from inheritune_ds.config.corpus import Corpus
from inheritune_ds.data.stream.mixture import (
    MAX_WINDOWS,
    Even,
    InTurn,
    Mixture,
    Weighted,
    Weights,
    round_table,
    weights_of,
)

SHARES = st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(any)


def walk(mixture: Mixture, num_sources: int, length: int) -> list[list[int]]:
    """Turns of every source after each of the first positions; `at` must agree with `turns_before`."""
    sources, turns = mixture.at(np.arange(length, dtype=np.int64))
    counts = [0] * num_sources
    rows = []
    for position, (source, turn) in enumerate(zip(sources.tolist(), turns.tolist(), strict=True)):
        assert mixture.turns_before(position) == counts
        assert turn == counts[source]
        counts[source] += 1
        rows.append(list(counts))
    return rows


def assert_within_one_window(rows: list[list[int]], shares: list[int]) -> None:
    for number, counts in enumerate(rows, 1):
        for count, share in zip(counts, shares, strict=True):
            assert abs(count * sum(shares) - number * share) < sum(shares), (number, counts, shares)


@given(shares=SHARES)
@settings(max_examples=150, deadline=None)
def test_weighted_sources_are_within_one_window_after_any_number(shares: list[int]) -> None:
    length = 2 * sum(shares) + 3
    rows = walk(Weighted([Weights(0, tuple(shares))]), len(shares), length)
    assert_within_one_window(rows, shares)
    assert rows[sum(shares) - 1] == shares


def test_all_small_rounds_are_within_one_window() -> None:
    for shares in product(range(9), repeat=4):
        if any(shares):
            table, before = round_table(shares)
            counts = np.cumsum(np.eye(4, dtype=np.int64)[table], axis=0)
            positions = np.arange(1, len(table) + 1)[:, None]
            assert (np.abs(counts * len(table) - positions * np.array(shares)) < len(table)).all(), shares
            assert (before == counts[positions[:, 0] - 1, table] - 1).all()


@pytest.mark.parametrize(
    "shares",
    [(134, 30, 9, 9, 9, 5, 4), (9999, 1), (1429,) * 6 + (1426,), (1,) * 10_000, (5003, 4001, 900, 90, 5, 1)],
    ids=["redpajama", "rare", "equal", "ten thousand", "steep"],
)
def test_long_rounds_are_within_one_window(shares: tuple[int, ...]) -> None:
    table, _ = round_table(shares)
    for source in range(min(len(shares), 8)):
        counts = np.cumsum(table == source)
        expected = np.arange(1, len(table) + 1) * shares[source]
        assert (np.abs(counts * len(table) - expected) < len(table)).all()


@given(
    shares=st.lists(st.lists(st.integers(0, 12), min_size=3, max_size=3).filter(any), min_size=1, max_size=4),
    gaps=st.lists(st.integers(1, 60), min_size=3, max_size=3),
)
def test_changed_weights_hold_from_the_next_round_and_stay_within_one_window(
    shares: list[list[int]], gaps: list[int]
) -> None:
    marks = [0, *np.cumsum(gaps).tolist()][: len(shares)]
    mixture = Weighted([Weights(mark, tuple(part)) for mark, part in zip(marks, shares, strict=True)])
    starts = mixture.starts
    for number in range(1, len(shares)):
        length = sum(shares[number - 1])
        assert starts[number] >= marks[number]
        assert (starts[number] - starts[number - 1]) % length == 0
        # No round earlier would do, unless the weights before begin there themselves.
        assert starts[number] - length < marks[number] or starts[number] == starts[number - 1]
    rows = walk(mixture, 3, starts[-1] + 2 * sum(shares[-1]))
    due = [Fraction(0)] * 3
    for position, counts in enumerate(rows):
        part = max(number for number, start in enumerate(starts) if start <= position)
        due = [had + Fraction(share, sum(shares[part])) for had, share in zip(due, shares[part], strict=True)]
        assert all(abs(count - expected) < 1 for count, expected in zip(counts, due, strict=True))


def test_changed_weights_are_where_the_marks_say() -> None:
    mixture = Weighted([Weights(0, (2, 1)), Weights(4, (0, 1)), Weights(5, (1, 1)), Weights(9, (1, 0))])
    assert mixture.starts == [0, 6, 6, 10]
    sources, turns = mixture.at(np.array([11, 0, 6, 7, 8, 9, 10], dtype=np.int64))
    assert sources.tolist() == [0, 0, 0, 1, 0, 1, 0]
    assert turns.tolist() == [7, 0, 4, 2, 5, 3, 6]


@given(sizes=st.lists(st.integers(1, 15), min_size=1, max_size=6))
def test_sources_without_weights_are_spread_evenly_over_an_epoch(sizes: list[int]) -> None:
    total = sum(sizes)
    rows = walk(Even(sizes), len(sizes), 3 * total)
    assert rows[total - 1] == sizes
    assert rows[-1] == [3 * size for size in sizes]
    for number, counts in enumerate(rows, 1):
        for count, size in zip(counts, sizes, strict=True):
            ahead = count - Fraction(number * size, total)
            assert -1 < ahead <= max(0, len(sizes) - 1)


@given(sizes=st.lists(st.integers(1, 2**37), min_size=1, max_size=7), data=st.data())
def test_even_is_exact_for_any_number_of_windows(sizes: list[int], data: st.DataObject) -> None:
    mixture = Even(sizes)
    positions = data.draw(st.lists(st.integers(0, 9 * sum(sizes)), min_size=1, max_size=10))
    sources, turns = mixture.at(np.array(positions, dtype=np.int64))
    for position, source, turn in zip(positions, sources.tolist(), turns.tolist(), strict=True):
        before, after = mixture.turns_before(position), mixture.turns_before(position + 1)
        assert [later - earlier for earlier, later in zip(before, after, strict=True)] == [
            int(number == source) for number in range(len(sizes))
        ]
        assert turn == before[source]


def test_even_refuses_more_windows_than_it_can_count() -> None:
    with pytest.raises(ValueError, match=f"{MAX_WINDOWS + 1} windows are more than {MAX_WINDOWS}"):
        Even([MAX_WINDOWS, 1])


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_sources_in_turn_follow_each_other(sizes: list[int]) -> None:
    mixture, total = InTurn(sizes), sum(sizes)
    walk(mixture, len(sizes), 3 * total)
    epoch = [source for source, size in enumerate(sizes) for _ in range(size)]
    assert mixture.at(np.arange(3 * total))[0].tolist() == epoch * 3


def corpus(**more: object) -> Corpus:
    document = {
        "sources": [
            {"kind": "files", "paths": ["a"], "name": "a", "weight": 0.67},
            {"kind": "files", "paths": ["b"], "name": "b", "weight": 0.33},
        ],
        **more,
    }
    return TypeAdapter(Corpus).validate_python(document)


def test_weights_of_a_corpus_count_marks_in_windows() -> None:
    changes = [
        {"at": "1000 tokens", "weights": {"b": 3, "a": 1}},
        {"at": "1025 tokens", "weights": {"a": 0, "b": 7}},
    ]
    assert weights_of(corpus(weight_changes=changes), 100) == [
        Weights(0, (67, 33)),
        Weights(10, (1, 3)),
        Weights(11, (0, 1)),
    ]


def test_weights_of_a_corpus_without_weights_are_none() -> None:
    sources = [{"kind": "files", "paths": ["a"]}, {"kind": "files", "paths": ["b"]}]
    assert weights_of(corpus(sources=sources), 100) is None
