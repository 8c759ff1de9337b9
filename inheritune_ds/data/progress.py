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

    def advance(self, amount: int, note: str = "") -> None:
        """Add to the count and show the new state.

        Args:
            amount: Units done since the last call.
            note: More to say, such as how many documents these were.
        """
        self.done += amount
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
        if self.total and self.done:
            parts.append(f"{max(0, self.total - self.done) / per_s:,.0f} s left")
        return ", ".join(part for part in parts if part)


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
