"""Input of every part of the GPU check."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from benchmarks.gpu_parts.report import Report

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """A running part; `folder` is removed afterwards, `deadline_s` (monotonic clock) is when its process is killed."""

    rehearse: bool
    nanogpt: Path | None
    folder: Path
    deadline_s: float
    report: Report

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """The measured device."""
        return "cpu" if self.rehearse else "cuda"

    @property
    def left_s(self) -> float:
        """Seconds until the part is killed."""
        return self.deadline_s - time.monotonic()

    def sized(self, real: T, toy: T) -> T:
        """The size of the measurement, or that of a rehearsal."""
        return toy if self.rehearse else real
