"""Signals to a process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from inheritune_ds.distributed.signals import SIGNALS, StopSignal

PROGRAM = """
import contextlib, ctypes, signal, sys, time
from inheritune_ds.distributed.signals import StopSignal
stop = StopSignal()
{ignored} and signal.signal({ignored}, signal.SIG_IGN)
stop.install()
{before}
with stop.interruptible() if {interruptible} else contextlib.nullcontext():
    print("ready", flush=True)
    seen = None
    for _ in range(500):
        time.sleep(0.02)
        if stop.requested != seen:
            seen = stop.requested
            print(seen, flush=True)
        {work}
"""


class Stopped:
    """A process that prints the signals it receives."""

    def __init__(self, *, interruptible: bool, before: str, work: str, measured: bool, ignored: int) -> None:
        # coverage saves its data in the thread that calls os._exit, beside the main thread: that may crash
        unmeasured = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                PROGRAM.format(interruptible=interruptible, before=before, work=work, ignored=ignored),
            ],
            env=None if measured else unmeasured,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


Start = Callable[..., Stopped]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Stopped] = []

    def make(
        *, interruptible: bool = False, before: str = "", work: str = "", measured: bool = True, ignored: int = 0
    ) -> Stopped:
        started.append(
            Stopped(interruptible=interruptible, before=before, work=work, measured=measured, ignored=ignored)
        )
        return started[-1]

    yield make
    for stopped in started:
        stopped.process.kill()
        stopped.process.communicate()


def test_a_second_interrupt_exits_at_once(start: Start) -> None:
    program = start()
    program.send(signal.SIGINT)
    assert program.line() == "SIGINT"
    time.sleep(0.1)
    assert program.process.poll() is None, "the first one is only a request"
    program.send(signal.SIGINT)
    assert program.process.wait(timeout=2.0) == 130


def test_a_second_interrupt_exits_also_from_c_code(start: Start) -> None:
    # As in a collective, the main thread runs no Python code.
    in_c = "print('C', flush=True); ctypes.CDLL(None).pause()"
    program = start(before="stop.leave_from_anywhere()", work=in_c, measured=False)
    assert program.line() == "C"
    for _ in range(2):
        time.sleep(0.2)
        program.send(signal.SIGINT)
    assert program.process.wait(timeout=2.0) == 130


def test_a_ctrl_c_to_a_forked_child_is_not_a_second_one(start: Start) -> None:
    fork = "stop.leave_from_anywhere(); import os; child = os.fork(); child or os.close(1)"
    program = start(before=f"{fork}; child or time.sleep(60)", work="pass")
    time.sleep(0.2)
    (child,) = Path(f"/proc/{program.process.pid}/task/{program.process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGINT)
    program.send(signal.SIGINT)
    time.sleep(0.3)
    assert program.process.poll() is None
    os.kill(int(child), signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_is_only_a_request_and_the_first_is_the_reason(number: signal.Signals, start: Start) -> None:
    program = start()
    program.send(number)
    assert program.line() == number.name
    program.send(signal.SIGTERM)
    program.send(signal.SIGUSR1)
    program.send(signal.SIGINT)  # the first of its kind
    time.sleep(0.3)
    assert program.process.poll() is None
    program.process.kill()
    assert program.process.communicate()[0] == ""


def test_a_hangup_that_nohup_ignores_stays_ignored(start: Start) -> None:
    program = start(ignored=signal.SIGHUP)
    program.send(signal.SIGHUP)
    time.sleep(0.2)
    program.send(signal.SIGTERM)
    assert program.line() == "SIGTERM"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_interrupts_interruptible_work(number: signal.Signals, start: Start) -> None:
    program = start(interruptible=True)
    program.send(number)
    _, errors = program.process.communicate(timeout=5.0)
    assert errors.splitlines()[-1] == "KeyboardInterrupt"


def test_another_rank_s_signal_interrupts_from_a_thread(start: Start) -> None:
    passing = "import threading; threading.Timer(0.5, stop.pass_on, ['SIGTERM on rank 1']).start()"
    program = start(interruptible=True, before=passing, work="time.sleep(60)")
    _, errors = program.process.communicate(timeout=5.0)
    assert errors.splitlines()[-1] == "KeyboardInterrupt"


def test_an_earlier_request_interrupts_at_once() -> None:
    stop = StopSignal()
    stop.pass_on("SIGTERM on rank 1")
    with pytest.raises(KeyboardInterrupt), stop.interruptible():
        pytest.fail("the work must not start")
    assert stop.requested == "SIGTERM on rank 1"


def test_cleanup_after_an_interrupt_is_not_interrupted() -> None:
    stop = StopSignal()
    with stop.interruptible():
        with pytest.raises(KeyboardInterrupt):
            stop._handle(signal.SIGTERM, None)
        stop._handle(signal.SIGTERM, None)


def test_a_late_second_interrupt_is_a_new_request(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopSignal()
    clock = iter([100.0, 105.5])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    stop._handle(signal.SIGINT, None)
    stop._handle(signal.SIGINT, None)
    assert stop.requested == "SIGINT"


def test_a_signal_while_the_interpreter_ends_does_not_change_the_exit_code(start: Start) -> None:
    slow = "import atexit; atexit.register(lambda: (print('ending', flush=True), time.sleep(1)))"
    program = start(before=slow, work="stop.retire(); sys.exit(7)")
    assert program.line() == "ending"
    for number in SIGNALS:
        program.send(number)
    assert program.process.wait(20) == 7
