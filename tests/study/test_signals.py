import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inheritune_ds.study import processes
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
    assert captured.out.endswith("study quickstart: stopped at quickstart; rerun the same command to resume\n")
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


def test_study_stops_ranks_that_are_still_starting(
    bench: Path, when_ready: Callable[[Callable[[], None]], threading.Thread], capfd: pytest.CaptureFixture[str]
) -> None:
    (bench.parent / "train.py").write_text(
        f"import pathlib, time\npathlib.Path('{bench}/ready').touch()\ntime.sleep(60)"
    )
    began = time.monotonic()
    thread = when_ready(interrupt_myself)
    assert start() is None
    thread.join()
    assert time.monotonic() - began < 20
    assert "stopped at quickstart-reference" in capfd.readouterr().out


def test_study_distinguishes_a_failed_run_from_a_stopped_one(
    bench: Path, when_ready: Callable[[Callable[[], None]], threading.Thread]
) -> None:
    script = (bench.parent / "train.py").read_text()
    (bench.parent / "train.py").write_text(
        script.replace('status("requeue")\n    os._exit(0)', 'status("failed")\n    os._exit(5)')
    )
    (bench / "quickstart").write_text("wait")
    thread = when_ready(interrupt_myself)
    with pytest.raises(StudyRunError, match="run quickstart ended with exit code 5"):
        start()
    thread.join()


def has_ended(pid: int) -> bool:
    """Whether a process ends within seconds; a zombie has ended."""
    stat = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + 5
    while stat.exists() and " Z " not in stat.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not stat.exists() or " Z " in stat.read_text()


ORPHAN = """
import os, pathlib, signal, subprocess
if os.environ["RANK"] == "0":
    pathlib.Path("orphan").write_text(str(subprocess.Popen(["sleep", "60"]).pid))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_study_kills_children_of_ranks_and_reports_the_signal(bench: Path) -> None:
    (bench.parent / "train.py").write_text(ORPHAN)
    with pytest.raises(StudyRunError, match="ended with exit code 137"):
        start()
    assert has_ended(int(Path("orphan").read_text()))


def test_study_kills_the_ranks_that_remain_after_a_failure(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import os, sys, time\ntime.sleep(60) if os.environ['RANK'] == '0' else sys.exit(6)\n"
    (bench.parent / "train.py").write_text(script)
    monkeypatch.setattr(processes, "GRACE_S", 0.3)
    began = time.monotonic()
    with pytest.raises(StudyRunError, match="ended with exit code 6"):
        start()
    assert time.monotonic() - began < 20
    assert survivors(bench) == []


def test_signal_before_the_ranks_start_is_forwarded(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bench / "quickstart-reference").write_text("wait")
    started = processes._start

    def slowly(*given: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return started(*given)

    monkeypatch.setattr(processes, "_start", slowly)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):  # one signal per rank
        start()
    assert time.monotonic() - began < 20
    assert survivors(bench) == []


def test_signals_leave_an_ignored_hangup_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with processes._Signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
