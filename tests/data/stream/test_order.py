import hashlib
import math
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from inheritune_ds.data.stream.order import Order, order_seeds, random_order, sequential_order, shuffled_order

SEEDS = st.integers(0, 2**64 - 1)

GOLDEN_10 = [2, 1, 6, 3, 8, 0, 7, 9, 4, 5, 8, 7, 0, 4, 2, 3, 9, 6, 1, 5]
GOLDEN_4M = [1658940, 513213, 227445, 736219, 3442915, 2355747, 235315, 252566, 1927225, 1370471]
GOLDEN_SHA256 = "44c3446a5b132c63a94a29566539998ad149effbe1568a192aa60d893faf4db9"
# The first words of splitmix64 begun at finalize(1337 + increment), written out apart from the package, modulo 1000.
GOLDEN_RANDOM = [946, 158, 38, 64, 138, 274]


def at(order: Order, turns: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Epochs and places of the only source."""
    return order(np.zeros_like(turns), turns)


def shuffled(num_windows: int, seed: int, first: int, count: int) -> list[int]:
    places: list[int] = at(shuffled_order([num_windows], [seed]), np.arange(first, first + count))[1].tolist()
    return places


@given(num_windows=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 2**20))
@settings(max_examples=150, deadline=None)
def test_shuffled_order_draws_each_window_once_per_epoch(num_windows: int, seed: int, epoch: int) -> None:
    first = epoch * num_windows
    epochs, ids = at(shuffled_order([num_windows], [seed]), np.arange(first, first + num_windows, dtype=np.int64))
    assert sorted(ids.tolist()) == list(range(num_windows))
    assert set(epochs.tolist()) == {epoch}


def test_shuffled_order_is_a_permutation_of_millions() -> None:
    num_windows = 1_000_003
    ids = at(shuffled_order([num_windows], [1337]), np.arange(num_windows))[1]
    assert np.array_equal(np.bincount(ids, minlength=num_windows), np.ones(num_windows, dtype=np.int64))


@given(num_windows=st.integers(1, 2**40), seed=SEEDS, turns=st.lists(st.integers(0, 2**50), min_size=1, max_size=40))
def test_shuffled_order_gives_one_turn_what_it_gives_many(num_windows: int, seed: int, turns: list[int]) -> None:
    order = shuffled_order([num_windows], [seed])
    epochs, ids = at(order, np.array(turns, dtype=np.int64))
    for index, turn in enumerate(turns):
        one_epoch, one_id = at(order, np.array([turn], dtype=np.int64))
        assert (one_epoch[0], one_id[0]) == (epochs[index], ids[index])
        assert epochs[index] == turn // num_windows
        assert 0 <= ids[index] < num_windows


def test_shuffled_order_differs_by_epoch_and_by_seed() -> None:
    n = 1000
    first, second, other = shuffled(n, 1, 0, n), shuffled(n, 1, n, n), shuffled(n, 2, 0, n)
    # A random permutation agrees with another in about 1 place, for any n.
    for left, right in ((first, second), (first, other), (second, other), (first, list(range(n)))):
        assert sum(a == b for a, b in zip(left, right, strict=True)) < 10


def test_shuffled_order_of_one_seed_is_not_another_one_shifted_by_an_epoch() -> None:
    n = 1000
    epochs_of_0 = [shuffled(n, 0, epoch * n, n) for epoch in range(4)]
    epochs_of_1 = [shuffled(n, 1, epoch * n, n) for epoch in range(4)]
    assert all(a != b for a in epochs_of_0 for b in epochs_of_1)


@pytest.mark.parametrize("num_windows", [2, 3, 4, 7, 16, 50])
def test_shuffled_order_looks_uniform(num_windows: int) -> None:
    """Chi-square over epochs: the window that is first (and last) is any one equally often."""
    num_epochs = 200 * num_windows
    order = shuffled_order([num_windows], [5])
    for place in (0, num_windows - 1):
        ids = at(order, np.arange(num_epochs, dtype=np.int64) * num_windows + place)[1]
        counts = Counter(ids.tolist())
        chi_square = sum((counts[window] - 200) ** 2 / 200 for window in range(num_windows))
        freedom = num_windows - 1
        assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_shuffled_order_separates_neighbours() -> None:
    ids = np.array(shuffled(10_000, 3, 0, 10_000))
    steps = np.abs(np.diff(ids))
    # Two random windows of n are n / 3 apart on average; the standard error here is 24.
    assert abs(float(steps.mean()) - 10_000 / 3) < 120
    assert np.corrcoef(ids[:-1], ids[1:])[0, 1] == pytest.approx(0, abs=0.04)


def test_shuffled_order_never_changes() -> None:
    """Golden values: a change here changes the data order of every run ever made."""
    assert shuffled(10, 1337, 0, 20) == GOLDEN_10
    assert shuffled(4_000_000, 1337, 31_999_990, 10) == GOLDEN_4M
    ids = np.array(shuffled(12_345, 2**64 - 1, 0, 3 * 12_345), dtype="<i8")
    assert hashlib.sha256(ids.tobytes()).hexdigest() == GOLDEN_SHA256


def test_shuffled_order_looks_up_a_batch_quickly() -> None:
    order, sources = shuffled_order([4_000_000, 1_000_003], [1337, 1338]), np.arange(512) % 2
    order(sources, np.arange(512))
    times_s = []
    for batch in range(50):
        started_s = time.perf_counter()
        order(sources, np.arange(batch * 512, (batch + 1) * 512))
        times_s.append(time.perf_counter() - started_s)
    # About 0.2 ms; the bound is wide because other work shares the machine.
    assert min(times_s) < 2e-3


def orders(sizes: list[int], seeds: list[int]) -> list[Order]:
    """One of each kind."""
    places = [size * 8 for size in sizes]
    return [shuffled_order(sizes, seeds), sequential_order(sizes), random_order(sizes, places, seeds)]


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=5), seed=SEEDS, data=st.data())
def test_orders_of_several_sources_are_those_of_each(sizes: list[int], seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 30))
    sources = np.array(data.draw(st.lists(st.integers(0, len(sizes) - 1), min_size=count, max_size=count)))
    turns = np.array(data.draw(st.lists(st.integers(0, 500), min_size=count, max_size=count)))
    seeds = [(seed + source) % 2**64 for source in range(len(sizes))]
    for number, order in enumerate(orders(sizes, seeds)):
        epochs, found = order(sources, turns)
        for index, (source, turn) in enumerate(zip(sources.tolist(), turns.tolist(), strict=True)):
            alone = orders([sizes[source]], [seeds[source]])[number]
            epoch, place = at(alone, np.array([turn]))
            assert (epoch[0], place[0]) == (epochs[index], found[index])


def test_sequential_order_reads_on() -> None:
    epochs, ids = at(sequential_order([3]), np.arange(7))
    assert ids.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert epochs.tolist() == [0, 0, 0, 1, 1, 1, 2]


def test_random_order_never_changes() -> None:
    assert at(random_order([10], [1000], [1337]), np.arange(6))[1].tolist() == GOLDEN_RANDOM


def test_random_order_draws_every_place_equally_often_and_repeats() -> None:
    num_places, draws = 50, 50 * 200
    epochs, places = at(random_order([25], [num_places], [3]), np.arange(draws))
    counts = np.bincount(places, minlength=num_places)
    assert len(counts) == num_places
    freedom = num_places - 1
    assert float(((counts - 200) ** 2 / 200).sum()) < freedom + 4 * math.sqrt(2 * freedom)
    # Of 50 draws with replacement from 50 places, 50 * (1 - (49 / 50) ** 50) = 31.8 are different on average.
    different = [len(set(row)) for row in places.reshape(-1, num_places).tolist()]
    assert abs(sum(different) / len(different) - 31.8) < 1
    assert epochs.tolist() == (np.arange(draws) // 25).tolist()


def test_order_seeds_depend_on_the_names_alone_and_that_of_one_source_is_the_runs() -> None:
    assert order_seeds(1337, ["a"]) == [1337]
    two, three = order_seeds(1, ["a", "b"]), order_seeds(1, ["b", "c", "a"])
    assert two == [three[2], three[0]]
    assert len({*three, *order_seeds(2, ["a", "b", "c"])}) == 6
