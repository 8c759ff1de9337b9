"""The harness's side of one subject: start it, give it a turn, watch other processes, end it."""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.launch import kill
from benchmarks.record import REPOSITORY
from benchmarks.subjects.turns import Order
from inheritune_ds.errors import MachineError

START_TIMEOUT_S = 1200.0
"""A first start compiles DeepSpeed's operators and the model."""
BLOCK_TIMEOUT_S = 900.0
_TICKS = os.sysconf("SC_CLK_TCK")
SAMPLE_S = 1.0
"""Length of the check whether the machine is quiet."""
_LOG_END = 3000
_NO_SESSION = -1


@dataclass(frozen=True)
class Block:
    """One turn of a subject.

    Attributes:
        other_cores: Cores that other processes kept busy; None where that cannot be read.
        repeats: Discarded blocks before this one, during which the machine was busy.
        loss: Of the last step, if the subject reports it.
        peak_memory_gib: Of the process so far.
    """

    steps: int
    seconds: float
    other_cores: float | None
    repeats: int
    loss: float | None
    peak_memory_gib: float


class Subject:
    """The warm, waiting process of a subject, run by the interpreter of its environment.

    Raises:
        MachineError: If it ends, or does not answer in time.
    """

    def __init__(self, order: Order, *, python: str, environ: Mapping[str, str], log: Path) -> None:
        self.order = order
        self._log = log
        path = os.pathsep.join([str(Path(python).parent), os.environ.get("PATH", "")])
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.subjects.worker", json.dumps(asdict(order))],
                cwd=REPOSITORY,
                env={**os.environ, "PATH": path, **environ},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                start_new_session=True,
            )
        self._received = b""
        try:
            self.first = self._answer(START_TIMEOUT_S)
        except BaseException:
            self.end()
            raise

    def block(self, seconds: float) -> Block:
        """Run the whole steps that fit into `seconds`, at least one."""
        steps = max(1, round(seconds / self.first["step_s"]))
        before = _cpu_seconds(self._process.pid)
        start = time.perf_counter()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: the missing answer is reported
            self._process.stdin.write(json.dumps({"steps": steps}).encode() + b"\n")
            self._process.stdin.flush()
        answer = self._answer(BLOCK_TIMEOUT_S)
        other = _other_cores(before, _cpu_seconds(self._process.pid), time.perf_counter() - start)
        expected = steps * self.order.step_windows
        if answer["windows"] != expected:
            raise self._broken(f"read {answer['windows']} windows in {steps} steps, not {expected}")
        return Block(steps, answer["seconds"], other, 0, answer["loss"], answer["peak_memory_gib"])

    def end(self) -> None:
        """End it and everything that it started."""
        kill(self._process)
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                if stream is not None:
                    stream.close()

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        descriptor, deadline = self._process.stdout.fileno(), time.monotonic() + timeout_s
        while b"\n" not in self._received:
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise self._broken(f"did not answer within {timeout_s:.0f} s")
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                raise self._broken("ended by itself")
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _broken(self, what: str) -> MachineError:
        text = self._log.read_text(encoding="utf-8", errors="replace").strip()
        return MachineError(
            f"the subject {self.order.subject} {what}; the end of its output:\n{text[-_LOG_END:]}",
            action="fix the error above, or run without this subject (--subjects)",
        )


def wait_until_quiet(max_other_cores: float, patience_s: float) -> bool:
    """Wait until other processes keep at most `max_other_cores` busy; False if that does not happen."""
    deadline = time.monotonic() + patience_s
    while True:
        before, start = _cpu_seconds(_NO_SESSION), time.perf_counter()
        time.sleep(SAMPLE_S)
        other = _other_cores(before, _cpu_seconds(_NO_SESSION), time.perf_counter() - start)
        if (other or 0.0) <= max_other_cores:
            return True
        if time.monotonic() >= deadline:
            return False


def _cpu_seconds(session: int) -> tuple[float, float] | None:
    """CPU time of the whole machine, and that of this process and of the processes of a session; None off Linux."""
    if sys.platform != "linux":
        return None
    with Path("/proc/stat").open(encoding="ascii") as stream:
        user, nice, system, _, _, irq, softirq, steal, *_ = (int(ticks) for ticks in stream.readline().split()[1:])
    own = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):  # it has ended meanwhile
                fields = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                if int(fields[3]) == session:
                    own += sum(int(ticks) for ticks in fields[11:15])
    return (user + nice + system + irq + softirq + steal) / _TICKS, own / _TICKS + time.process_time()


def _other_cores(before: tuple[float, float] | None, after: tuple[float, float] | None, seconds: float) -> float | None:
    """Cores that neither the subject nor the harness kept busy."""
    if before is None or after is None:
        return None
    return max(0.0, (after[0] - before[0]) - (after[1] - before[1])) / seconds
