"""Runs the processes of parts, ends those whose time is over, and leaves nothing of them behind.

Parts start programs in sessions of their own, and programs lose their parents. So every process of a part is known by
a variable of its environment, which all that it starts inherits.
"""

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.record import REPOSITORY

MARK = "INHERITUNE_DS_GPU_PART"
_POLL_S, _KILL_S = 0.1, 30.0


@dataclass(frozen=True)
class Start:
    """A process to start, with its log and time limit; `environ` extends this process's environment."""

    command: Sequence[str]
    environ: Mapping[str, str]
    log: Path
    limit_s: float


@dataclass(frozen=True)
class Ending:
    """End of a process: exit code, negative signal, or None after its time limit; and its seconds."""

    code: int | None
    seconds: float

    @property
    def words(self) -> str:
        """The ending of a process that was not done."""
        if self.code is None:
            return f"ended after {self.seconds:.0f} s: its time was over"
        return f"its process ended with code {self.code}"


def watch(starts: Sequence[Start]) -> list[Ending]:
    """Run processes side by side until each has ended or reached its limit; kill their remaining children."""
    marks = [uuid.uuid4().hex for _ in starts]
    began = time.monotonic()
    processes: list[subprocess.Popen[bytes]] = []
    endings: dict[int, Ending] = {}
    try:
        processes += (_run(start, mark) for start, mark in zip(starts, marks, strict=True))
        while len(endings) < len(starts):
            time.sleep(_POLL_S)
            for number, (start, process) in enumerate(zip(starts, processes, strict=True)):
                passed = time.monotonic() - began
                if number not in endings and (process.poll() is not None or passed > start.limit_s):
                    endings[number] = Ending(process.poll(), passed)
                    _kill_marked(marks[number])
    finally:
        for mark in marks:
            _kill_marked(mark)
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_KILL_S)
    return [endings[number] for number in range(len(starts))]


def _run(start: Start, mark: str) -> subprocess.Popen[bytes]:
    with start.log.open("wb") as stream:
        return subprocess.Popen(
            start.command,
            cwd=REPOSITORY,
            env={**os.environ, **start.environ, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _kill_marked(mark: str) -> None:
    """Kill every process that has the mark, until none is left: one may start another meanwhile.

    A process that hangs in a driver cannot be killed; it is not waited for without end.
    """
    wanted, deadline_s = f"{MARK}={mark}".encode(), time.monotonic() + _KILL_S
    while found := [number for number in _processes() if wanted in _environ_of(number)]:
        if time.monotonic() > deadline_s:
            return
        for number in found:
            with suppress(OSError):
                os.kill(number, signal.SIGKILL)
        time.sleep(_POLL_S / 10)


def _processes() -> list[int]:
    return [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdecimal()]


def _environ_of(number: int) -> list[bytes]:
    """Variables of a process; empty for one that has ended or belongs to another user."""
    try:
        return Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
