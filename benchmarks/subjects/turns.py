"""The subject's side of a side-by-side measurement: it trains on request and waits otherwise.

One JSON line each way. A subject answers when its warm-up is done and after every block of steps; it receives
`{"steps": n}` or `{"end": true}`. Nothing of the package is imported here, so that a subject may live in an
environment of its own.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any, TextIO


@dataclass(frozen=True)
class Order:
    """Request to a subject.

    Attributes:
        subject: A key of `worker.SUBJECTS`.
        shape: The model, in the keys of a recipe's `shape`; windows are as long as its positions.
        micro_batch: Windows a micro-step.
        accumulation: Micro-steps an optimizer step.
        device: `cpu` or `cuda`.
        keep_freed_memory: Whether the C allocator keeps freed memory.
        tokens: Token file (uint16, little-endian).
        folder: Where the subject may write.
        total_steps: Nominal length of the run, which is ended long before.
        started_s: Start of the process, in seconds of the monotonic clock.
        nanogpt: Folder of a nanoGPT checkout.
    """

    subject: str
    shape: dict[str, Any]
    micro_batch: int
    accumulation: int
    device: str
    keep_freed_memory: bool
    tokens: str
    folder: str
    warmup_steps: int
    total_steps: int
    started_s: float
    nanogpt: str | None = None

    @property
    def seq_len(self) -> int:
        """Inputs of a window."""
        return int(self.shape["max_position_embeddings"])

    @property
    def step_windows(self) -> int:
        """Windows an optimizer step."""
        return self.micro_batch * self.accumulation


LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-3, 0.01, 1.0
"""Of every subject."""


class Finished(BaseException):
    """The measurement is over; no framework's handler of errors takes it for one."""


class Turns:
    """Counts the steps of a subject and holds it between its turns."""

    def __init__(self, order: Order, orders: TextIO, answers: TextIO) -> None:
        self.windows = 0
        """Windows that the subject has read; whatever hands them out counts them."""
        self.packages: tuple[str, ...] = ()
        """Distributions; the first answer reports their versions."""
        self.notes: tuple[str, ...] = ()
        """Choices of the subject; reported with the first answer."""
        self._order, self._orders, self._answers = order, orders, answers
        self._warm = False
        self._first_step_s = self._last_step_s = self._last_s = 0.0
        self._start_block(order.warmup_steps)

    def step_done(self, loss: Callable[[], float] | None = None) -> None:
        """Report the end of an optimizer step; returns when the next one may begin.

        `loss` is called outside the measured time. Raises Finished after the last step.
        """
        self._left -= 1
        if not self._warm:
            self._synchronize()
            now = time.monotonic()
            self._first_step_s = self._first_step_s or now - self._order.started_s
            self._last_step_s, self._last_s = now - self._last_s, now
        if self._left:
            return
        self._synchronize()
        seconds = time.monotonic() - self._start_s
        self._answer(seconds, loss() if loss is not None else None)
        request = self._orders.readline()
        steps = json.loads(request).get("steps", 0) if request else 0
        if not steps:
            raise Finished
        self._start_block(steps)

    def _answer(self, seconds: float, loss: float | None) -> None:
        answer: dict[str, Any] = {
            "steps": self._steps,
            "seconds": seconds,
            "windows": self.windows - self._windows_before,
            "loss": loss,
            "peak_memory_gib": self._peak_memory_gib(),
        }
        if not self._warm:
            self._warm = True
            answer |= {"first_step_s": self._first_step_s, "step_s": self._last_step_s}
            answer |= {"versions": {name: metadata.version(name) for name in self.packages}, "notes": self.notes}
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()

    def _start_block(self, steps: int) -> None:
        self._steps = self._left = steps
        self._windows_before = self.windows
        self._last_s = self._start_s = time.monotonic()

    def _synchronize(self) -> None:
        if self._order.device == "cuda":
            sys.modules["torch"].cuda.synchronize()

    def _peak_memory_gib(self) -> float:
        if self._order.device == "cuda":
            return float(sys.modules["torch"].cuda.max_memory_allocated() / 2**30)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def own_channel() -> tuple[TextIO, TextIO]:
    """Keep standard input and output for the harness; whatever else is printed goes to standard error."""
    orders, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123 - its descriptor is wanted
        os.dup2(nothing.fileno(), 0)
    return orders, answers
