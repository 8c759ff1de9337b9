"""Progress of long reading and tokenizing on stderr: a bar on a terminal, a line every 10 s elsewhere."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_INTERVAL_S = 10.0


class Meter:
    """Counts what was done and shows it; use it as a context manager.

    Args:
        title: What is being done, such as `tokenizing`.
        unit: What is counted, such as `tokens`.
        total: How many there will be, when that is known; then the time left is shown too.
    """

    def __init__(self, title: str, unit: str, total: int | None = None) -> None:
        self.title = title
        self.unit = unit
        self.total = total
        self.done = 0
        self._bar: tuple[Progress, TaskID] | None = None
        self._started_s = self._line_due_s = 0.0
        self._share: float | None = None
        self._first_share: float | None = None

    def __enter__(self) -> Self:
        self._started_s = time.monotonic()
        self._line_due_s = self._started_s + LINE_INTERVAL_S
        if sys.stderr.isatty():
            self._bar = _open_bar(self.title, self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar[0].stop()
            self._bar = None

    def advance(self, amount: int, note: str = "", share: float | None = None) -> None:
        """Add to the count and show the new state.

        Args:
            amount: Units done since the last call.
            note: More to say, such as how many documents these were.
            share: How much of all is done, from 0 to 1, where that is known better than from `total`.
        """
        self.done += amount
        if share is not None and self._first_share is None:
            self._first_share = share
        self._share = share
        now_s = time.monotonic()
        if self._bar:
            progress, task = self._bar
            progress.update(task, completed=self.done, note=self._state(now_s, note))
        elif now_s >= self._line_due_s:
            self._line_due_s = now_s + LINE_INTERVAL_S
            print(f"{self.title}: {self._state(now_s, note)}", file=sys.stderr, flush=True)

    def _state(self, now_s: float, note: str) -> str:
        per_s = self.done / max(now_s - self._started_s, 1e-9)
        of_total = f" of {self.total:,}" if self.total else ""
        parts = [f"{self.done:,}{of_total} {self.unit}", note, f"{per_s:,.0f} {self.unit}/s"]
        left_s = self._left_s(now_s, per_s)
        if left_s is not None:
            parts.append(f"{left_s:,.0f} s left")
        return ", ".join(part for part in parts if part)

    def _left_s(self, now_s: float, per_s: float) -> float | None:
        """Seconds left, by the share of the input that was read (if it is given) or by the total."""
        if self._share is not None and self._first_share is not None:
            since = self._share - self._first_share  # what an earlier, killed process did took none of this time
            return (now_s - self._started_s) * max(0.0, 1.0 - self._share) / since if since > 0 else None
        return max(0, self.total - self.done) / per_s if self.total and self.done else None


def _open_bar(title: str, total: int | None) -> "tuple[Progress, TaskID]":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        transient=True,
    )
    progress.start()
    return progress, progress.add_task(title, total=total, note="")
