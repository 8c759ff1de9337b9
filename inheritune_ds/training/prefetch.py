"""Read the micro-batches of the next step during the present one."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch


class Prefetcher:
    """Reads micro-batches ahead, on a thread.

    Args:
        read: Batch number to its micro-batches, arrays (B, T + 1) of token ids.
        pin: Put them into page-locked memory, for asynchronous copies to the GPU.
    """

    def __init__(self, read: Callable[[int], Iterable[npt.NDArray[np.int64]]], *, pin: bool) -> None:
        self._read, self._pin = read, pin
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._next: tuple[int, Future[list[torch.Tensor]]] | None = None
        self.waited_s = 0.0
        """Total seconds of waiting in `take`."""

    def take(self, number: int, following: int | None) -> list[torch.Tensor]:
        """The micro-batches of a batch; starts reading the following one, unless it is None."""
        start = time.perf_counter()
        if self._next is None or self._next[0] != number:
            self._next = number, self._thread.submit(self._tensors, number)
        batches = self._next[1].result()
        self.waited_s += time.perf_counter() - start
        self._next = None if following is None else (following, self._thread.submit(self._tensors, following))
        return batches

    def close(self) -> None:
        """End the thread and drop its batch."""
        self._thread.shutdown(cancel_futures=True)

    def _tensors(self, number: int) -> list[torch.Tensor]:
        batches = [torch.from_numpy(batch) for batch in self._read(number)]
        return [batch.pin_memory() for batch in batches] if self._pin else batches
