import random

import pytest

from inheritune_ds.plan.model_size import tensors
from inheritune_ds.plan.page_locked import chunk_layout
from inheritune_ds.plan.zero_memory import states
from tests.plan.test_memory import OPENLLAMA_3B, layout


@pytest.mark.parametrize("seed", range(20))
def test_tensors_are_aligned_apart_and_inside_chunks_of_powers_of_two(seed: int) -> None:
    generator = random.Random(seed)
    given = {str(number): generator.randint(1, 1 << generator.randint(1, 24)) for number in range(50)}
    found = chunk_layout(given)
    assert all(size & (size - 1) == 0 for size in found.sizes)
    assert found.places.keys() == given.keys()
    ends = [0] * len(found.sizes)
    for key, (number, first) in sorted(found.places.items(), key=lambda item: item[1]):
        assert first % 512 == 0
        assert ends[number] <= first
        ends[number] = first + given[key]
    assert all(0 < end <= size for end, size in zip(ends, found.sizes, strict=True))


def test_one_tensor_takes_the_next_power_of_two() -> None:
    assert chunk_layout({"a": (1 << 20) + 1}).sizes == (1 << 21,)
    assert chunk_layout({}).bytes == 0


@pytest.mark.parametrize("ranks", [1, 8])
def test_the_copy_of_an_async_save_takes_a_hundredth_more_than_its_tensors(ranks: int) -> None:
    model = tensors(OPENLLAMA_3B, 13)
    off, on = (
        states(model, layout(world_size=ranks, async_save=given), accumulation=8).host for given in (False, True)
    )
    assert off == 0
    assert 1.0 <= on / (12 * model.total / ranks) < 1.01
    flat = (4 * model.total // ranks - 1).bit_length()
    assert on < 0.9 * 3 * (1 << flat), "three flat tensors would be rounded up"


def test_the_copy_of_an_async_save_adds_to_what_is_offloaded() -> None:
    model, offload = tensors(OPENLLAMA_3B, 13), {"zero_stage": 3, "offload_optimizer": True}
    without, copied, both = (
        states(model, layout(**given), accumulation=8).host
        for given in (offload, {"async_save": True}, {**offload, "async_save": True})
    )
    assert both == without + copied
