"""The processes of one run: one Python per rank, with the environment variables of the deepspeed launcher.

The ranks are children of the study in a process group of their own: a Ctrl-C in the terminal reaches only the study,
which forwards it and waits. The launcher would kill the ranks 30 seconds after a Ctrl-C, even during a save.
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

from inheritune_ds.distributed.world import free_port

DEFAULT_PORT = 29500
"""Of the deepspeed launcher (deepspeed/constants.py, TORCH_DISTRIBUTED_DEFAULT_PORT)."""
GRACE_S = 30.0
"""Seconds from the failure of a rank until the others are killed."""
POLL_S = 0.1


def choose_port() -> int:
    """The launcher's default port, or a free one if another process uses it."""
    with socket.socket() as probe:
        try:
            probe.bind(("", DEFAULT_PORT))
        except OSError:
            return free_port()
        return DEFAULT_PORT


def run_ranks(words: Sequence[str], num_ranks: int, port: int) -> tuple[int, int]:
    """Run a script with its arguments on every rank and wait until all have ended; `port` is of rank 0's rendezvous.

    Returns the exit code of the first rank that failed (128 + n after signal n), 0 if none did, and the number of
    signals received.
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
    """Start one rank in a process group; 0: a new one."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **{k: str(v) for k, v in numbers.items()}}
    return subprocess.Popen([sys.executable, "-u", *words], env={**os.environ, **variables}, process_group=group)


def _wait(ranks: Sequence[subprocess.Popen[bytes]], signals: "_Signals") -> int:
    """Wait until all ranks have ended, or GRACE_S after the first failure; its exit code."""
    failed, forwarded, deadline_s = 0, 0, math.inf
    while True:
        codes = [rank.poll() for rank in ranks]
        if not failed and any(codes):
            failed = next(code for code in codes if code)
            deadline_s = time.monotonic() + GRACE_S
        if None not in codes or time.monotonic() > deadline_s:
            return failed
        for number in signals.received[forwarded:]:
            forwarded += 1
            for rank in ranks:
                rank.send_signal(number)
        time.sleep(POLL_S)


def _kill(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill the remaining processes of the group: hanging ranks and their children."""
    if ranks:
        with suppress(ProcessLookupError):
            os.killpg(ranks[0].pid, signal.SIGKILL)
    for rank in ranks:
        rank.wait()


class _Signals:
    """Collects Ctrl-C, SIGTERM and SIGHUP for the ranks instead of ending this process."""

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
