"""Reads the micro-batches of the next step while the present one is computed."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch


class Prefetcher:
    """The micro-batches of one step after the other, read on a thread of its own.

    Args:
        read: The micro-batches of a step, by the number of its batch: arrays (B, T + 1) of token ids.
        pin: Put them into page-locked memory, from which a GPU copies while it computes.
    """

    def __init__(self, read: Callable[[int], Iterable[npt.NDArray[np.int64]]], *, pin: bool) -> None:
        self._read, self._pin = read, pin
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._next: tuple[int, Future[list[torch.Tensor]]] | None = None
        self.waited_s = 0.0
        """Seconds that `take` has waited, all in all."""

    def take(self, number: int, following: int | None) -> list[torch.Tensor]:
        """The micro-batches of a batch; those of the following one (None: there is none) are read from now on."""
        start = time.perf_counter()
        if self._next is None or self._next[0] != number:
            self._next = number, self._thread.submit(self._tensors, number)
        batches = self._next[1].result()
        self.waited_s += time.perf_counter() - start
        self._next = None if following is None else (following, self._thread.submit(self._tensors, following))
        return batches

    def close(self) -> None:
        """End the thread; what it still reads is thrown away."""
        self._thread.shutdown(cancel_futures=True)

    def _tensors(self, number: int) -> list[torch.Tensor]:
        batches = [torch.from_numpy(batch) for batch in self._read(number)]
        return [batch.pin_memory() for batch in batches] if self._pin else batches
