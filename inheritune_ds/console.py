"""Print log lines and progress, and lose lines instead of the run.

Progress is a bar on a terminal and a plain line every ten seconds elsewhere.
"""

import errno
import logging
import os
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self, TextIO, cast

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_INTERVAL_S = 10.0
_STDOUT, _STDERR = 1, 2
_GONE = (errno.EPIPE, errno.EIO)
"""Errors of a pipe without a reader, and of a terminal that has been closed."""


class Screen:
    """Standard output or error as a text stream that masks each text and never raises an OSError.

    A text that cannot be written is lost: the disk under a log is full, the pipe has no reader, the terminal has been
    closed. A file is tried again with each text. The output to a closed pipe or terminal is discarded from then on,
    also that of C code and child processes, which a broken pipe would kill.

    Args:
        stream: The stream to write to.
        mask: Removes secrets from a text; a secret split over several writes is not recognized.
    """

    def __init__(self, stream: TextIO, mask: Callable[[str], str]) -> None:
        self._stream = stream
        self._mask = mask

    def write(self, text: str) -> int:
        """Write a text; return its length before masking."""
        masked = self._mask(text)
        with self._lossy():
            try:
                self._stream.write(masked)
            except UnicodeEncodeError:  # a locale without the character, or a path that is no UTF-8
                encoding = self._stream.encoding
                self._stream.write(masked.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write the buffered text."""
        with self._lossy():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _lossy(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _GONE:
                with suppress(OSError):  # not a stream of a file
                    _discard(self._stream.fileno())


def own_screen(mask: Callable[[str], str]) -> None:
    """Replace standard output and error by a Screen, also for libraries and tracebacks; again changes nothing."""
    for number, name in ((_STDOUT, "stdout"), (_STDERR, "stderr")):
        stream = getattr(sys, name)
        if isinstance(stream, Screen):
            continue
        if stream is None:  # it was closed before the start (`>&-`)
            stream = _null_stream(number)
        setattr(sys, name, cast("TextIO", Screen(stream, mask)))


def _discard(descriptor: int) -> None:
    """Point standard output and error at the null device, as far as they are this pipe or terminal."""
    gone = os.fstat(descriptor)
    if stat.S_ISREG(gone.st_mode):  # a disk error may pass
        return
    null = os.open(os.devnull, os.O_WRONLY)
    for standard in (_STDOUT, _STDERR):
        with suppress(OSError):  # closed
            if os.path.samestat(os.fstat(standard), gone):
                os.dup2(null, standard)
    os.close(null)


def _null_stream(number: int) -> TextIO:
    """Open the null device up to a closed descriptor; the next opened file would take it, and C code prints there."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < number:
        pass
    return os.fdopen(descriptor, "w", encoding="utf-8")


def log_to_console(*, is_main: bool = True) -> None:
    """Print the package's log records on standard output, one plain line each; only on rank 0 (`is_main`)."""
    logger = logging.getLogger("inheritune_ds")
    logger.handlers[:] = [_ConsoleHandler() if is_main else logging.NullHandler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a handler that a library gives the root logger would print each line again


class _ConsoleHandler(logging.Handler):
    """Prints to the current `sys.stdout`, which a visible bar redirects to the lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        level = f"{record.levelname}: " if record.levelno > logging.INFO else ""
        print(f"{level}{record.getMessage()}", flush=True)


class Meter:
    """Counts finished work and shows it on stderr; use it as a context manager.

    Args:
        title: Of the work, such as `tokenizing`.
        unit: Of the count, such as `tokens`.
        total: Final count, if known; the time left is then shown, too.
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
        self._bar = _open_bar(sys.stderr, self.title, self.total, transient=True)
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
            note: More text, such as the number of documents.
            share: Finished part of all work, from 0 to 1, if known better than from `total`.
        """
        self.done += amount
        if share is not None and self._first_share is None:
            self._first_share = share
        self._share = share
        now_s = time.monotonic()
        if self._bar:
            bar, task = self._bar
            bar.update(task, completed=self.done, state=self._state(now_s, note))
        elif now_s >= self._line_due_s:
            self._line_due_s = now_s + LINE_INTERVAL_S
            print(f"{self.title}: {self._state(now_s, note)}", file=sys.stderr, flush=True)

    def _state(self, now_s: float, note: str) -> str:
        per_s = self.done / max(now_s - self._started_s, 1e-9)
        rate = f"{per_s:,.0f}" if per_s >= 1 else f"{per_s:.2g}"
        of_total = f" of {self.total:,}" if self.total else ""
        parts = [f"{self.done:,}{of_total} {self.unit}", note, f"{rate} {self.unit}/s"]
        left_s = self._left_s(now_s, per_s)
        if left_s is not None:
            parts.append(f"{left_s:,.0f} s left")
        return ", ".join(part for part in parts if part)

    def _left_s(self, now_s: float, per_s: float) -> float | None:
        """Seconds left, by the finished share of the input (if given) or by the total."""
        if self._share is not None and self._first_share is not None:
            since = self._share - self._first_share  # excludes the work of an earlier, killed process
            return (now_s - self._started_s) * max(0.0, 1.0 - self._share) / since if since > 0 else None
        return max(0, self.total - self.done) / per_s if self.total and self.done else None


class TrainingProgress:
    """Shows the steps of a run on standard output; the last one stays.

    Args:
        total_steps: Steps of the whole run.
        start_step: Steps done before this launch.
        label: Beginning of the line, the run's name.
    """

    def __init__(self, total_steps: int, start_step: int, label: str) -> None:
        self._total_steps = total_steps
        self._label = label
        self._begun: tuple[float, int] | None = None
        self._line_due_s = 0.0
        self._pending = ""
        self._bar = _open_bar(sys.stdout, label, total_steps, done=start_step, transient=False)

    def update(self, step: int, loss: float, tokens_per_s: float) -> None:
        """Show a step.

        Args:
            step: Steps done.
            loss: Training loss of the step, nats per token.
            tokens_per_s: Speed, all ranks together.
        """
        now_s = time.monotonic()
        left = self._time_left(now_s, step)
        state = f"{step}/{self._total_steps}  loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s  {left}"
        if self._bar:
            bar, task = self._bar
            bar.update(task, completed=step, state=state)
            return
        self._pending = f"{self._label}  step {state}"
        if now_s >= self._line_due_s:
            self._line_due_s = now_s + LINE_INTERVAL_S
            self._print_pending()

    def close(self) -> None:
        """Leave the last state on the screen; may be called again."""
        if self._bar:
            self._bar[0].stop()
        self._print_pending()

    def _print_pending(self) -> None:
        if self._pending:
            print(self._pending, flush=True)
            self._pending = ""

    def _time_left(self, now_s: float, step: int) -> str:
        # Measured from the first update on: compilation and the first step happen once.
        if self._begun is None:
            self._begun = now_s, step
        begun_s, begun_step = self._begun
        if step == begun_step:
            return "time left unknown" if step < self._total_steps else "done"
        seconds = round((now_s - begun_s) / (step - begun_step) * (self._total_steps - step))
        if step >= self._total_steps:
            return "done"
        hours, rest = divmod(seconds, 3600)
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d} left"


def _open_bar(
    file: IO[str], title: str, total: int | None, *, done: int = 0, transient: bool
) -> "tuple[Progress, TaskID] | None":
    """Show a bar if `file` is a terminal; text printed from then on appears above it."""
    if not file.isatty():
        return None
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}")
    bar = Progress(
        *columns,
        console=Console(file=file, soft_wrap=True),
        transient=transient,
        redirect_stdout=sys.stdout.isatty(),  # a file receives its lines unchanged
        redirect_stderr=sys.stderr.isatty(),
    )
    bar.start()
    return bar, bar.add_task(title, total=total, completed=done, state="")
