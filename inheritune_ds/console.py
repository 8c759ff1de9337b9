"""Progress on the console: a bar on a terminal, plain lines elsewhere."""

import math
import sys
import time
from time import monotonic
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PLAIN_INTERVAL_S = 10.0
"""Seconds between the progress lines of a run whose output is not a terminal."""


class RunProgress:
    """The progress of a run: a bar on a terminal, a plain line every ten seconds elsewhere.

    Args:
        total_steps: Steps of the whole run.
        start_step: Steps done before this launch.
        label: What the line begins with, the run's name.
        file: Where to write; standard output when left out.
    """

    def __init__(self, total_steps: int, start_step: int, label: str, *, file: IO[str] | None = None) -> None:
        self._total_steps = total_steps
        self._label = label
        self._file = file or sys.stdout
        self._begun: tuple[float, int] | None = None
        self._printed_at = -math.inf
        self._pending = ""
        self._bar: Any = None
        self._task: Any = None
        if self._file.isatty():
            self._bar, self._task = self._make_bar(start_step)

    def _make_bar(self, start_step: int) -> tuple[Any, Any]:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        bar = RichProgress(
            TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[numbers]}"),
            console=Console(file=self._file),
            expand=True,
        )
        task = bar.add_task(self._label, total=self._total_steps, completed=start_step, numbers="")
        bar.start()
        return bar, task

    def update(self, step: int, loss: float, tokens_per_s: float) -> None:
        """Show a step.

        Args:
            step: Steps done.
            loss: Training loss of the step, nats per token.
            tokens_per_s: Speed, all ranks together.
        """
        now = monotonic()
        numbers = f"loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s  {self._time_left(now, step)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
            return
        self._pending = f"{self._label}  step {step}/{self._total_steps}  {numbers}"
        if now - self._printed_at >= PLAIN_INTERVAL_S:
            self._printed_at = now
            self._print_pending()

    def say(self, line: str) -> None:
        """Print a line of its own, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=self._file, flush=True)

    def close(self) -> None:
        """Leave the last state on the screen; a second call does nothing."""
        if self._bar is not None:
            self._bar.stop()
        self._print_pending()

    def _print_pending(self) -> None:
        if self._pending:
            print(self._pending, file=self._file, flush=True)
            self._pending = ""

    def _time_left(self, now: float, step: int) -> str:
        # From the first update on, since what comes before it (compiling, the first step) is paid once.
        if self._begun is None:
            self._begun = now, step
        begun_at, begun_step = self._begun
        if step == begun_step:
            return "time left unknown" if step < self._total_steps else "done"
        seconds = round((now - begun_at) / (step - begun_step) * (self._total_steps - step))
        if step >= self._total_steps:
            return "done"
        hours, rest = divmod(seconds, 3600)
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d} left"


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
