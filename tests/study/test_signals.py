import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from inheritune_ds.study import runner
from inheritune_ds.study.runner import StudyRunError
from tests.study.bench import interrupt_myself, start, survivors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_study_lets_the_ranks_save_at_a_signal(
    bench: Path, when_ready: Callable[[Callable[[], None]], threading.Thread], number: signal.Signals,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (bench / "quickstart").write_text("wait")
    thread = when_ready(lambda: os.kill(os.getpid(), number))
    assert start() is None
    thread.join()
    captured = capfd.readouterr()
    assert captured.out.endswith("study quickstart: stopped at quickstart; the same command goes on\n")
    assert captured.err == ""
    assert json.loads(Path("runs/quickstart/status.json").read_text()) == {"state": "requeue"}
    assert survivors(bench) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_study_ends_at_once_at_a_second_interrupt(
    bench: Path, when_ready: Callable[[Callable[[], None]], threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    (bench / "quickstart").write_text("wait")
    monkeypatch.setenv("SAVE_S", "60")

    def twice() -> None:
        interrupt_myself()
        deadline = time.monotonic() + 20
        while not (bench / "saving").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        interrupt_myself()

    began = time.monotonic()
    thread = when_ready(twice)
    with pytest.raises(KeyboardInterrupt):
        start()
    thread.join()
    assert time.monotonic() - began < 20
    assert survivors(bench) == []


def test_study_stops_a_launcher_that_has_no_ranks_yet(
    bench: Path, when_ready: Callable[[Callable[[], None]], threading.Thread], capfd: pytest.CaptureFixture[str]
) -> None:
    (bench.parent / "bin/deepspeed").write_text(f"#!/bin/sh\ntouch {bench}/ready\nexec sleep 60\n")
    began = time.monotonic()
    thread = when_ready(interrupt_myself)
    assert start() is None
    thread.join()
    assert time.monotonic() - began < 20
    assert "stopped at quickstart-reference" in capfd.readouterr().out


def test_study_tells_a_run_that_failed_from_one_that_was_stopped(
    bench: Path, when_ready: Callable[[Callable[[], None]], threading.Thread]
) -> None:
    script = (bench / "rank.py").read_text()
    (bench / "rank.py").write_text(
        script.replace('status("requeue")\n    os._exit(0)', 'status("failed")\n    os._exit(5)')
    )
    (bench / "quickstart").write_text("wait")
    thread = when_ready(interrupt_myself)
    with pytest.raises(StudyRunError, match="run quickstart ended with exit code 5"):
        start()
    thread.join()


def test_study_kills_what_outlives_its_launcher(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = bench.parent / "bin/deepspeed"
    launcher.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {bench}/orphan\nkill -9 $$\n")
    monkeypatch.setattr(runner, "_LEAVE_S", 0.3)
    with pytest.raises(StudyRunError, match="ended with exit code 137"):
        start()
    stat = Path(f"/proc/{(bench / 'orphan').read_text().strip()}/stat")
    deadline = time.monotonic() + 5
    while stat.exists() and " Z " not in stat.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not stat.exists() or " Z " in stat.read_text()


def test_signals_that_come_before_the_launcher_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(runner, "_group", lambda _: {10: 1, 11: 10, 12: 11, 13: 11, 14: 12})
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    with runner._Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert sent == []
        signals.pass_to(10)
    assert sent == [(12, signal.SIGINT), (13, signal.SIGINT)]
    assert signals.count == 1


def test_signals_leave_an_ignored_hangup_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with runner._Signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
