"""The watchdog in processes that it ends."""

import json
import os
import pty
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import pytest

from inheritune_ds.config.reliability import Reliability
from inheritune_ds.distributed.watchdog import GRACE_S, LAST_WORDS_S, TICK_S, Watchdog
from inheritune_ds.distributed.world import World
from tests.launching import environment, free_port
from tests.warm_python import WarmProcess, WarmPython

LIMIT_S = 1.0
SLACK_S = 2.0  # for a busy machine
PROGRAM = """
import ctypes, json, os, pathlib, sys, time
from inheritune_ds.config.reliability import Reliability
from inheritune_ds.distributed.watchdog import Watchdog
from inheritune_ds.distributed.world import World
folder, limits = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
def on_hang(reason, code):
    (folder / f"ended-{rank}.json").write_text(json.dumps([reason, code]))
def sleep_for_ever():
    time.sleep(600)
if size > 1:
    from inheritune_ds.distributed.coordination import open_store
    store = open_store()
watch = Watchdog(Reliability(watchdog_s=limits), World(rank, size, rank, size, "env"), folder, on_hang=on_hang)
(folder / f"began-{rank}").write_text(repr(time.time()))
BODY
watch.close()
(folder / f"done-{rank}").touch()
"""


class Watched(NamedTuple):
    """A process under a watchdog, and the file of its stderr."""

    process: WarmProcess
    log: Path

    def end(self) -> tuple[int, str]:
        """Exit code and stderr."""
        return self.process.wait(timeout=60), self.log.read_text()


Start = Callable[..., Watched]


def without_reader(output: str) -> IO[bytes]:
    """A stream for output that cannot be written: `closed pipe`, `closed terminal`, or a device."""
    if not output.startswith("closed"):
        return Path(output).open("wb")
    reader, writer = os.pipe() if output == "closed pipe" else pty.openpty()
    os.close(reader)
    return os.fdopen(writer, "wb")


@pytest.fixture
def start(warm: WarmPython, tmp_path: Path) -> Iterator[Start]:
    started: list[Watched] = []

    def make(
        body: str, limits: dict[str, float] | None = None, folder: Path = tmp_path, output: str = "", **extra: str
    ) -> Watched:
        folder.mkdir(exist_ok=True)
        words = ["-c", PROGRAM.replace("BODY", body), str(folder), json.dumps(limits or {"step": LIMIT_S})]
        path = tmp_path / f"errors-{len(started)}.txt"
        with without_reader(output) if output else path.open("wb") as log:
            process = warm.start(words, cwd=tmp_path, env=environment(**extra), stdout=log)
        started.append(Watched(process, path))
        return started[-1]

    yield make
    for watched in started:
        watched.process.kill()
        watched.process.wait()


def seconds_since_begin(folder: Path, rank: int = 0) -> float:
    return time.time() - float((folder / f"began-{rank}").read_text())


def stacks(folder: Path, rank: int = 0) -> str:
    (path,) = (folder / "logs").glob(f"hang-*-rank-{rank:05d}.txt")
    return path.read_text()


@pytest.mark.launch
def test_a_phase_that_overruns_ends_the_process_with_stacks_and_message(start: Start, tmp_path: Path) -> None:
    process = start("with watch.phase('step', 7):\n    sleep_for_ever()")
    code, errors = process.end()
    assert seconds_since_begin(tmp_path) < LIMIT_S + 3 * TICK_S + SLACK_S
    assert code == 13
    reason, code = json.loads((tmp_path / "ended-0.json").read_text())
    assert (reason.startswith("hang in step at step 7 on rank 0 ("), code) == (True, 13)
    assert reason.endswith(f": over {LIMIT_S:g} s")
    assert errors.startswith(
        f"inheritune-ds: error: {reason}\n  allowed: reliability.watchdog_s.step: 1\n  do: look at"
    )
    written = stacks(tmp_path)
    assert written.startswith(f"{reason}\nrank 0 on ")
    assert "is in step at step 7" in written
    assert "in sleep_for_ever" in written
    assert "MainThread" in written


@pytest.mark.launch
@pytest.mark.parametrize("output", ["closed pipe", "closed terminal", "/dev/full"])
def test_an_output_that_cannot_be_written_costs_its_message_only(output: str, start: Start, tmp_path: Path) -> None:
    process = start("with watch.phase('step', 7):\n    sleep_for_ever()", output=output)
    assert process.process.wait(timeout=60) == 13
    assert json.loads((tmp_path / "ended-0.json").read_text())[1] == 13
    assert "in sleep_for_ever" in stacks(tmp_path)


@pytest.mark.launch
def test_every_rank_writes_its_stacks_and_exits(start: Start, tmp_path: Path) -> None:
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    bodies = {0: "import threading\nthreading.Lock().acquire()\ntime.sleep(600)",
              1: "with watch.phase('step', 3), watch.phase('data', 3):\n    sleep_for_ever()"}  # fmt: skip
    ranks = [start(bodies[rank], **meeting, RANK=str(rank)) for rank in bodies]
    codes, errors = zip(*[rank.end() for rank in ranks], strict=True)
    assert seconds_since_begin(tmp_path) < LIMIT_S + 6 * TICK_S + SLACK_S
    assert codes == (13, 13)
    reasons = [json.loads((tmp_path / f"ended-{rank}.json").read_text())[0] for rank in bodies]
    assert reasons[0] == reasons[1]
    assert reasons[0].startswith("hang in data at step 3 on rank 1 (")
    assert "reliability.watchdog_s.step: 1" in errors[1]
    assert "is in no watched phase" in stacks(tmp_path, 0)
    assert "is in data at step 3" in stacks(tmp_path, 1)
    assert len({path.name[:21] for path in (tmp_path / "logs").iterdir()}) == 1, "files of one hang share its time"


@pytest.mark.launch
def test_a_rank_exits_alone_when_the_store_has_ended(start: Start, tmp_path: Path) -> None:
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    main = start("os._exit(9)", **meeting, RANK="0")
    second = start("with watch.phase('step', 3):\n    sleep_for_ever()", **meeting, RANK="1")
    assert main.end()[0] == 9
    assert second.end()[0] == 13
    assert seconds_since_begin(tmp_path, 1) < LIMIT_S + 3 * TICK_S + SLACK_S
    assert "in sleep_for_ever" in stacks(tmp_path, 1)


@pytest.mark.launch
def test_work_that_holds_the_interpreter_is_ended_a_little_later(start: Start, tmp_path: Path) -> None:
    befores = {
        "no tick of the watch's thread": "pass",
        "a tick": "time.sleep(1.2 * 0.5)",
        "a phase inside, whose longer limit is over with it": "with watch.phase('validation', 7): pass",
    }
    body = "with watch.phase('step', 7):\n    {}\n    ctypes.PyDLL(None).sleep(600)"
    limits = {"step": LIMIT_S, "validation": 60.0}
    started = {name: start(body.format(before), limits, tmp_path / name) for name, before in befores.items()}
    for name, process in started.items():
        code, errors = process.end()
        assert seconds_since_begin(tmp_path / name) < LIMIT_S + GRACE_S + 3 * TICK_S + SLACK_S
        assert code == 1
        assert "Timeout" in errors
        assert '  File "<string>", line ' in errors


@pytest.mark.launch
def test_work_that_holds_the_interpreter_may_take_its_phase_s_limit(start: Start, tmp_path: Path) -> None:
    # The clock of the phase before, and then of the inner one, would run out in the middle.
    grace = "import inheritune_ds.distributed.watchdog as module\nmodule.GRACE_S = 0.0\n"
    hold = "ctypes.PyDLL(None).usleep(1800000)"
    body = (
        f"{grace}with watch.phase('step', 7):\n    pass\nwith watch.phase('validation', 7):\n    {hold}\n"
        f"    with watch.phase('step', 7):\n        pass\n    {hold}"
    )
    process = start(body, {"step": LIMIT_S, "validation": 60.0})
    code, errors = process.end()
    assert (code, errors) == (0, "")


@pytest.mark.launch
def test_it_exits_when_a_disk_or_a_listener_hangs(start: Start, tmp_path: Path) -> None:
    process = start("watch._on_hang = lambda *_: time.sleep(600)\nwith watch.phase('step', 7):\n    sleep_for_ever()")
    assert process.end()[0] == 13
    assert seconds_since_begin(tmp_path) < LIMIT_S + 3 * TICK_S + LAST_WORDS_S + SLACK_S


@pytest.mark.launch
def test_only_the_innermost_phase_counts(start: Start, tmp_path: Path) -> None:
    body = """
with watch.phase('step', 7):
    for _ in range(3):
        with watch.phase('validation', 7):
            time.sleep(1.1)
with watch.phase('step', 8):
    time.sleep(0.8)
time.sleep(3.0)
"""
    process = start(body, {"step": LIMIT_S, "validation": 60.0})
    code, errors = process.end()
    assert (code, errors) == (0, "")
    assert (tmp_path / "done-0").exists()
    assert not (tmp_path / "logs").exists()


@pytest.mark.launch
def test_a_suspended_process_is_not_a_hung_one(start: Start, tmp_path: Path) -> None:
    # A SIGTSTP may last any time: here longer than limit and grace.
    limit_s = 2.0
    body = "import inheritune_ds.distributed.watchdog as module\nmodule.GRACE_S = {}\n"
    body += "with watch.phase('step', 7):\n    for _ in range(20):\n        time.sleep(0.05)"
    started = {
        number: start(body.format(grace_s), {"step": limit_s}, tmp_path / number.name)
        for number, grace_s in ((signal.SIGSTOP, GRACE_S), (signal.SIGTSTP, 0.5))
    }
    deadline_s = time.monotonic() + 60
    while not all((tmp_path / number.name / "began-0").exists() for number in started):
        assert time.monotonic() < deadline_s
        time.sleep(0.002)
    time.sleep(0.6)  # faulthandler is waiting, too
    for number, process in started.items():
        process.process.send_signal(number)
    time.sleep(limit_s + 2.0)
    for number, process in started.items():
        assert not (tmp_path / number.name / "done-0").exists(), "it was not stopped in time"
        process.process.send_signal(signal.SIGCONT)
    assert [process.end() for process in started.values()] == [(0, "")] * 2


def test_it_can_be_turned_off(tmp_path: Path) -> None:
    before = threading.active_count()
    off = Reliability(watchdog=False, watchdog_s={"step": 0.0})
    watch = Watchdog(off, World(0, 1, 0, 1, "single"), tmp_path, on_hang=print)
    with watch.phase("step", 1):
        assert threading.active_count() == before
        time.sleep(3 * TICK_S)
    watch.close()


def test_a_phase_costs_microseconds(tmp_path: Path) -> None:
    watch = Watchdog(Reliability(), World(0, 1, 0, 1, "single"), tmp_path, on_hang=print)
    begun = time.perf_counter()
    for step in range(2000):
        with watch.phase("step", step), watch.phase("data", step):
            pass
    seconds = time.perf_counter() - begun
    watch.close()
    assert seconds / 2000 < 1e-4
    assert list(tmp_path.iterdir()) == []
