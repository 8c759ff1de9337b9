"""The search for the largest micro-batch: few trials, none that is expected not to fit, the smallest has to."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from inheritune_ds.config.deepspeed import Resolved
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.distributed.world import World
from inheritune_ds.errors import MachineError
from inheritune_ds.training import micro_batch
from inheritune_ds.training.kernels import Kernels
from inheritune_ds.training.micro_batch import divisors, largest_that_fits
from inheritune_ds.training.packing import DocumentPacking
from inheritune_ds.training.peak_memory import peak_memory_gib, reset_peak_memory


def search(
    sizes: list[int], peak: Callable[[int], float], limit_gib: float, sequence_gib: float
) -> tuple[int, list[int]]:
    tried: list[int] = []

    def measure(size: int) -> float:
        tried.append(size)
        return peak(size)

    return largest_that_fits(sizes, limit_gib, measure, sequence_gib=sequence_gib), tried


@pytest.mark.parametrize("limit", [4.0, 5.0, 7.9, 18.0, 33.9, 34.0, 100.0])
@pytest.mark.parametrize("per_rank", [1, 12, 32, 97])
@pytest.mark.parametrize("known", [True, False])
def test_largest_divisor_below_the_limit_is_found(limit: float, per_rank: int, known: bool) -> None:  # noqa: FBT001
    sizes = divisors(per_rank)
    found, tried = search(sizes, lambda size: 2.0 + size, limit, 1.0 if known else 0.0)
    assert found == max(size for size in sizes if 2.0 + size <= limit)
    assert len(tried) <= (2 if known else 7)
    assert len(tried) <= 2 or 2.0 + max(tried) <= limit, "what does not fit is not tried"


@pytest.mark.parametrize("known", [True, False])
def test_an_update_that_takes_more_than_small_passes_is_seen_through(known: bool) -> None:  # noqa: FBT001
    found, tried = search(divisors(64), lambda size: max(36.6, 33.0 + 3.6 * size), 45.6, 3.6 if known else 0.0)
    assert found == 2
    assert max(tried) <= 4


def test_sizes_between_the_last_that_fits_and_the_first_that_does_not_are_tried() -> None:
    found, tried = search([1, 2, 3, 4], lambda size: 1.0 if size < 4 else math.inf, 10.0, 0.0)
    assert (found, tried) == (3, [1, 2, 4, 3])


def test_smallest_that_does_not_fit_is_refused_with_ways_out() -> None:
    with pytest.raises(MachineError) as caught:
        search([1, 2, 4], lambda size: 7.0 + size, 6.0, 0.0)
    assert caught.value.problem == "a step with a micro-batch of 1 takes 8.0 GiB, but a rank may use 6.0 GiB"
    assert "activation_checkpointing" in caught.value.action


def test_peak_starts_anew_after_a_reset() -> None:
    reset_peak_memory()
    before = peak_memory_gib()
    block = torch.ones(2**28)  # 1 GiB
    raised = peak_memory_gib()
    assert raised > before + 0.5
    del block
    reset_peak_memory()
    assert peak_memory_gib() < raised


@pytest.mark.parametrize("packing", [None, DocumentPacking(0)])
def test_a_trial_keeps_documents_apart_as_the_run_does(
    tmp_path: Path,
    recipe: Recipe,
    resolved: Callable[..., Resolved],
    monkeypatch: pytest.MonkeyPatch,
    packing: DocumentPacking | None,
) -> None:
    built: list[tuple[int, Any]] = []

    def engine(_model: Any, config: dict[str, Any], _world: World, _kernels: Kernels, packing: Any, **_: Any) -> None:
        built.append((config["train_micro_batch_size_per_gpu"], packing))

    def peak(build: Callable[[int, int], Any], size: int, **_: int) -> float:
        build(size, 1)
        return 0.1 * size

    monkeypatch.setattr(micro_batch, "Engine", engine)
    monkeypatch.setattr(micro_batch, "measure_peak", peak)
    monkeypatch.setattr(micro_batch, "load_model", lambda *_, **__: None)
    (tmp_path / "config.json").write_text('{"vocab_size": 9}')
    world = World(rank=0, size=1, local_rank=0, local_size=1, launcher="single")
    found = micro_batch.find_largest(
        resolved({"train_micro_batch_size_per_gpu": 1}),
        recipe,
        tmp_path,
        kernels=Kernels("sdpa", "torch", False, "plain", False, "none"),
        packing=packing,
        world=world,
        limit_gib=0.95,
    )
    assert found == 8  # 0.8 of 0.95 GiB
    assert [size for size, _ in built][:1] == [1]
    assert {given for _, given in built} == {packing}
