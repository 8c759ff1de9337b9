import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from inheritune_ds.checkpoints.train_state import Requests
from inheritune_ds.cli import main
from inheritune_ds.distributed.signals import StopSignal
from inheritune_ds.distributed.world import World
from inheritune_ds.training import requests
from inheritune_ds.training.requests import Controls

MAIN, SECOND = World(0, 2, 0, 2, "env"), World(1, 2, 1, 2, "env")


@pytest.fixture(autouse=True)
def look_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "LOOK_S", 0.0)


def test_a_signal_is_a_request_to_stop_and_the_reason(tmp_path: Path) -> None:
    for world in (MAIN, SECOND):
        stop = StopSignal()
        asked = Controls(tmp_path, stop, world)
        assert asked.requests() == Requests()
        assert asked.reason == "another rank was asked to stop"
        stop._handle(signal.SIGTERM, None)
        assert asked.requests() == Requests(stop=True)
        assert asked.reason == "SIGTERM"


def test_files_are_requests_until_they_are_handled(tmp_path: Path) -> None:
    asked = Controls(tmp_path, StopSignal(), MAIN)
    for name, request in {
        "SAVE": Requests(save=True),
        "EVAL": Requests(evaluate=True),
        "STOP": Requests(stop=True),
    }.items():
        (tmp_path / name).touch()
        assert asked.requests() == request
        asked.acknowledge(Requests())
        assert asked.requests() == request
        asked.acknowledge(request)
        assert not (tmp_path / name).exists()
        assert asked.requests() == Requests()
    assert asked.reason == "the file STOP in the run folder", "also after the file is deleted"


def test_only_rank_0_looks_for_files_and_removes_them(tmp_path: Path) -> None:
    asked = Controls(tmp_path, StopSignal(), SECOND)
    (tmp_path / "SAVE").touch()
    assert asked.requests() == Requests()
    asked.acknowledge(Requests(save=True))
    assert (tmp_path / "SAVE").exists()


def test_files_are_looked_for_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "LOOK_S", 1.0)
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    asked = Controls(tmp_path, StopSignal(), MAIN)
    assert asked.requests() == Requests()
    (tmp_path / "SAVE").touch()
    now[0] += 0.9
    assert asked.requests() == Requests()
    now[0] += 0.2
    assert asked.requests() == Requests(save=True)


def test_a_disk_that_fails_for_a_moment_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Controls(tmp_path, StopSignal(), MAIN)
    (tmp_path / "SAVE").touch()

    def stale(*_given: object, **_named: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stale)
        assert asked.requests() == Requests()
    assert asked.requests() == Requests(save=True)


def test_a_stop_from_before_the_command_is_removed(tmp_path: Path, logged: Callable[[], list[str]]) -> None:
    path, stop = tmp_path / "STOP", StopSignal()
    time.sleep(0.05)
    path.touch()
    assert Controls(tmp_path, stop, MAIN).requests() == Requests(stop=True)
    assert logged() == []
    os.utime(path, (time.time() - 60.0,) * 2)
    assert Controls(tmp_path, stop, MAIN).requests() == Requests()
    assert logged() == [f"removed {path}: it is older than this command"]
    assert not path.exists()


def test_a_file_that_cannot_be_removed_is_handled_once(
    tmp_path: Path, logged: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Controls(tmp_path, StopSignal(), MAIN)
    (tmp_path / "SAVE").touch()

    def refuse(_path: Path, missing_ok: bool = False) -> None:  # noqa: FBT001, FBT002 (Path.unlink's own)
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    assert asked.requests() == Requests(save=True)
    asked.acknowledge(Requests(save=True))
    assert asked.requests() == Requests()
    assert logged() == [
        f"WARNING: {tmp_path / 'SAVE'} cannot be removed (Read-only file system); it is ignored from now on"
    ]


def test_the_time_limit_leaves_room_for_a_step_and_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    age = [601.0]
    monkeypatch.setattr(StopSignal, "age_s", property(lambda _: age[0]))
    asked = Controls(tmp_path, StopSignal(), MAIN, max_minutes=10.0)
    assert not asked.requests().stop, "not before the first step"
    asked.stepped(0.0)
    assert asked.requests().stop
    age[0] = 539.0  # the estimate of the first save is a tenth of the limit
    assert not asked.requests().stop
    age[0] = 541.0
    assert asked.requests().stop
    assert asked.reason == "--max-minutes 10"
    asked.saved(4.0)
    asked.saved(1.0)
    asked.stepped(3.0)
    assert not asked.requests().stop
    age[0] = 585.0  # 2 * 4 + 2 * 3
    assert not asked.requests().stop
    age[0] = 587.0
    assert asked.requests().stop
    for _ in range(8):
        asked.stepped(0.1)  # the slow first step leaves the window
    assert not asked.requests().stop
    day = Controls(tmp_path, StopSignal(), MAIN, max_minutes=24 * 60.0)
    day.stepped(0.0)
    age[0] = 24 * 3600.0 - 301.0  # the estimate is at most 300 s
    assert not day.requests().stop
    age[0] += 2.0
    assert day.requests().stop
    assert not Controls(tmp_path, StopSignal(), MAIN).requests().stop, "no limit by default"


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon"])
def test_an_invalid_time_limit_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--max-minutes", text])
    assert caught.value.code == 2
    message = f"argument --max-minutes: '{text}' is not a time limit (allowed: minutes, a number above 0)"
    assert message in capsys.readouterr().err
