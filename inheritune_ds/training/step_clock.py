"""Time the parts of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class PassClock:
    """Sums the time of the passes: wall clock on a CPU, events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *_: object) -> None:
        self._spans.append((self._start, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self) -> float:
        """The sum; waits for the last pass on a GPU."""
        if not self._cuda:
            return float(sum(end - start for start, end in self._spans))
        if self._spans:
            self._spans[-1][1].synchronize()
        return float(sum(start.elapsed_time(end) for start, end in self._spans)) / 1000.0


class StepClock:
    """Times optimizer steps since the last `restart`, from the end of one to the end of the next.

    The loop's own work between steps counts, validation and checkpoints do not. Means need one ended step.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._waited_s = 0.0
        self.last_s = 0.0
        self.restart()
        self._mark_s = time.perf_counter()

    def restart(self) -> None:
        """Begin a new sum."""
        self._sum_s, self._passes_s, self._wait_s, self._steps = 0.0, 0.0, 0.0, 0

    def lap(self, passes_s: float, waited_s: float) -> None:
        """End a step with its time in the passes; `waited_s` is the total wait for data since the start."""
        # A step ends with the loss and the gradient norm on the host: the device is idle.
        now = time.perf_counter()
        self.last_s, self._mark_s = now - self._mark_s, now
        self._sum_s += self.last_s
        self._passes_s += passes_s
        self._wait_s += waited_s - self._waited_s
        self._waited_s = waited_s
        self._steps += 1

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Do not count the time inside."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self._mark_s += time.perf_counter() - start_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all ranks."""
        return self._tokens / (self._sum_s / self._steps)

    def metrics(self) -> dict[str, float]:
        """The metrics of the clock (see METRICS)."""
        return {
            "perf/tokens_per_s": self.tokens_per_s,
            "perf/step_ms": 1000.0 * (self._sum_s / self._steps),
            "perf/outside_ratio": 1.0 - self._passes_s / self._sum_s,
            "perf/data_wait_ratio": self._wait_s / self._sum_s,
        }
