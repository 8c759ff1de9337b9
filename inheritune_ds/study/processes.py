"""The processes of one run: a Python for each rank, started and ended together.

The environment variables are those of the deepspeed launcher. The ranks are children of the study, in a process group
of their own: a Ctrl-C in the terminal reaches the study alone, which passes it on to the ranks and waits. The
launcher would kill them 30 seconds after a Ctrl-C, in the middle of a save if need be.
"""

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, Self

DEFAULT_PORT = 29500
"""Where the ranks of the deepspeed launcher meet (deepspeed/constants.py, TORCH_DISTRIBUTED_DEFAULT_PORT)."""
GRACE_S = 30.0
"""Seconds that the other ranks get to leave after one has failed; then they are killed."""
POLL_S = 0.1


def choose_port() -> int:
    """The launcher's default port, or a free one if another run has it."""
    with socket.socket() as probe:
        try:
            probe.bind(("", DEFAULT_PORT))
        except OSError:
            probe.bind(("", 0))
        return int(probe.getsockname()[1])


def run_ranks(words: Sequence[str], num_ranks: int, port: int) -> tuple[int, int]:
    """Run a script on every rank and wait until all have ended.

    Args:
        words: The script and its arguments.
        num_ranks: Number of processes.
        port: Where they meet.

    Returns:
        The exit code of the first rank that failed (128 + n when signal n ended it), 0 if none did; and how many
        signals came meanwhile.
    """
    ranks: list[subprocess.Popen[bytes]] = []
    with _Signals() as signals:
        try:
            for rank in range(num_ranks):
                group = ranks[0].pid if ranks else 0
                ranks.append(_start(words, rank, num_ranks, port, group))
            code = _wait(ranks, signals)
        finally:
            _kill(ranks)
    return (code if code >= 0 else 128 - code), len(signals.received)


def _start(words: Sequence[str], rank: int, num_ranks: int, port: int, group: int) -> subprocess.Popen[bytes]:
    """Start one rank in a process group; group 0 is a new one."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **{k: str(v) for k, v in numbers.items()}}
    return subprocess.Popen([sys.executable, "-u", *words], env={**os.environ, **variables}, process_group=group)


def _wait(ranks: Sequence[subprocess.Popen[bytes]], signals: "_Signals") -> int:
    """Wait until all ranks have ended, or one has failed and the others had their time; the first failure's code."""
    failed, passed_on, deadline_s = 0, 0, math.inf
    while True:
        codes = [rank.poll() for rank in ranks]
        if not failed and any(codes):
            failed = next(code for code in codes if code)
            deadline_s = time.monotonic() + GRACE_S
        if None not in codes or time.monotonic() > deadline_s:
            return failed
        for number in signals.received[passed_on:]:
            passed_on += 1
            for rank in ranks:
                rank.send_signal(number)
        time.sleep(POLL_S)


def _kill(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill what is left of the process group: ranks that hang, and what ranks have started."""
    if ranks:
        with suppress(ProcessLookupError):
            os.killpg(ranks[0].pid, signal.SIGKILL)
    for rank in ranks:
        rank.wait()


class _Signals:
    """While it is open, a Ctrl-C, SIGTERM or SIGHUP is noted for the ranks and does not end this process."""

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            handler = signal.getsignal(number)
            if handler is not signal.SIG_IGN:  # nohup has a SIGHUP ignored
                self._before[number] = handler
                signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        # The ranks handle SIGINT and SIGTERM (distributed/signals.py, StopSignal).
        self.received.append(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
