"""The search for the largest micro-batch: few trials, none that is expected not to fit, the smallest has to."""

import pytest
import torch

from inheritune_ds.errors import MachineError
from inheritune_ds.training.micro_batch import divisors, largest_that_fits
from inheritune_ds.training.peak_memory import peak_memory_gib, reset_peak_memory


def search(sizes: list[int], base_gib: float, each_gib: float, limit_gib: float) -> tuple[int, list[int], list[str]]:
    tried: list[int] = []
    lines: list[str] = []

    def measure(size: int) -> float:
        tried.append(size)
        return base_gib + each_gib * size

    return largest_that_fits(sizes, limit_gib, measure, lines.append), tried, lines


@pytest.mark.parametrize("limit", [4.0, 5.0, 7.9, 18.0, 33.9, 34.0, 100.0])
@pytest.mark.parametrize("per_rank", [1, 12, 32, 97])
def test_largest_divisor_below_the_limit_is_found_in_three_trials(limit: float, per_rank: int) -> None:
    sizes = divisors(per_rank)
    found, tried, lines = search(sizes, 2.0, 1.0, limit)
    assert found == max(size for size in sizes if 2.0 + size <= limit)
    assert len(tried) == len(lines) <= 3
    assert len(tried) <= 2 or 2.0 + max(tried) <= limit, "what the line says does not fit is not tried"


def test_search_goes_on_when_memory_grows_slower_than_the_line() -> None:
    tried: list[int] = []

    def measure(size: int) -> float:
        tried.append(size)
        return {1: 4.0, 2: 8.0, 4: 9.0, 8: 10.0, 16: 11.0}[size]

    assert largest_that_fits([1, 2, 4, 8, 16], 17.0, measure, lambda _: None) == 16
    assert tried == [1, 2, 4, 16]


def test_smallest_that_does_not_fit_is_refused_with_ways_out() -> None:
    with pytest.raises(MachineError) as caught:
        search([1, 2, 4], 7.0, 1.0, 6.0)
    assert caught.value.problem == "a step with a micro-batch of 1 takes 8.0 GiB, but a rank may use 6.0 GiB"
    assert "activation_checkpointing" in caught.value.action


def test_peak_starts_anew_after_a_reset() -> None:
    before = peak_memory_gib()
    block = torch.ones(2**28)  # 1 GiB
    raised = peak_memory_gib()
    assert raised > before + 0.5
    del block
    reset_peak_memory()
    assert peak_memory_gib() < raised
