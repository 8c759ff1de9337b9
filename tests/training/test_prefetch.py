"""Batches are read one step ahead, in order, and errors are raised by `take`."""

import threading
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from inheritune_ds.training.prefetch import Prefetcher

Batch = npt.NDArray[np.int64]


def test_steps_come_in_order_and_one_ahead() -> None:
    asked: list[int] = []
    ready = threading.Event()

    def read(step: int) -> Iterator[Batch]:
        asked.append(step)
        if step == 4:
            ready.set()
        yield np.full((2, 3), step)
        yield np.full((2, 3), -step)

    batches = Prefetcher(read, pin=False)
    first = batches.take(3, 4)
    assert [tensor.tolist() for tensor in first] == [[[3] * 3] * 2, [[-3] * 3] * 2]
    assert ready.wait(10), "step 4 is read before it is asked for"
    assert int(batches.take(4, None)[0][0, 0]) == 4
    batches.close()
    assert asked == [3, 4], "nothing is read after the end"
    assert batches.waited_s > 0.0


def test_another_step_than_the_next_is_read_at_once() -> None:
    batches = Prefetcher(lambda step: [np.full((1, 2), step)], pin=False)
    assert int(batches.take(0, 1)[0][0, 0]) == 0
    assert int(batches.take(50, 51)[0][0, 0]) == 50
    batches.close()


def test_an_error_of_reading_is_raised_by_take() -> None:
    def read(step: int) -> list[Batch]:
        raise ValueError(f"step {step} cannot be read")

    batches = Prefetcher(read, pin=False)
    with pytest.raises(ValueError, match="step 0 cannot be read"):
        batches.take(0, None)
    batches.close()
