"""Point 13: an output that cannot be written costs its lines, and a hangup saves and leaves; nothing else is lost."""

import fcntl
import os
import pty
import signal
import subprocess
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.campaign.launching import (
    MARK,
    RANKS,
    START_TIMEOUT_S,
    TROUBLED,
    Launched,
    Launcher,
    TinyRun,
    check_same,
    status,
)
from benchmarks.campaign.part import Figures, Part
from benchmarks.record import REPOSITORY
from inheritune_ds.checkpoints.store import CheckpointStore
from tests.launching import environment, launcher_line

AT, STEPS = 6, 12
"""The step at which the output breaks, and those of the run; a checkpoint is saved every 4."""
PAUSE_S = 3.0
OUTPUTS = ("closed pipe", "full disk", "closed terminal", "hangup", "ignored hangup")


@dataclass(frozen=True)
class Trial:
    """What happens to the output at step AT, and to which launcher."""

    output: str
    launcher: Launcher

    @property
    def name(self) -> str:
        """Name of the case."""
        return f"{self.output.replace(' ', '_')}_{self.launcher}"

    @property
    def stops(self) -> bool:
        """Whether the run gets a hangup that it saves for."""
        return self.output in ("closed terminal", "hangup")


@contextmanager
def _output(trial: Trial, log: Path) -> Iterator[tuple[int, Callable[[], None]]]:
    """The descriptor of the output, and the function that breaks it."""
    reader = -1
    if trial.output == "closed pipe":
        reader, writer = os.pipe()
    elif trial.output == "closed terminal":
        reader, writer = pty.openpty()
    else:
        path = Path("/dev/full") if trial.output == "full disk" else log
        writer = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        yield writer, partial(os.close, reader) if reader >= 0 else lambda: None
    finally:
        with suppress(OSError):
            os.close(writer)


def _before(trial: Trial, output: int) -> None:
    """In the new process: nohup's setting, or the terminal that hangs up when it is closed."""
    if trial.output == "ignored hangup":
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if trial.output == "closed terminal":
        fcntl.ioctl(output, termios.TIOCSCTTY, 0)


def run(trial: Trial, folder: Path) -> Figures:
    """Break the output in the middle of a run, let it end, and compare with an uninterrupted run."""
    tiny = TinyRun(folder, trial.launcher)
    ranks = RANKS[trial.launcher]
    command = [*launcher_line(trial.launcher, ranks), str(REPOSITORY / TROUBLED), *tiny.words]
    environ = environment(**{MARK: str(folder), "TROUBLE": f"pause:step:{AT}:{PAUSE_S}"})
    log = folder / "log.txt"
    log.touch()
    with _output(trial, log) as (output, fail):
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=partial(_before, trial, output),  # noqa: PLW1509 - this process has one thread
        )
        os.close(output)
        launched = Launched(process, log, str(folder), 0.0)
        marks = [folder / f"paused-{rank}" for rank in range(ranks)]
        launched.wait_for(lambda: all(mark.exists() for mark in marks))
        fail()
        if "hangup" in trial.output:
            for mark in marks:
                os.kill(int(mark.read_text(encoding="utf-8")), signal.SIGHUP)
        code = launched.wait(START_TIMEOUT_S)
        assert (left := launched.orphans()) == [], f"processes stay: {left}"
    ended = status(tiny.path)
    assert code == 0, f"exit code {code}, {ended}\n{launched.output()[-4000:]}"
    newest = CheckpointStore(tiny.path / "checkpoints", keep=3, keep_every=None).newest_intact()
    assert newest is not None
    expected = ("requeue", AT) if trial.stops else ("finished", STEPS)
    assert (ended["state"], newest.state.step) == expected, ended
    if trial.stops:
        tiny.to_end()
    broken = tiny.set_aside()
    tiny.to_end()
    check_same(broken, tiny.path, "a run with its output has")
    return {"steps_lost": 0, "saved_step": newest.state.step}


TRIALS = [
    *(Trial(output, "python") for output in OUTPUTS),
    *(Trial(output, "torchrun") for output in ("closed pipe", "full disk", "hangup")),
]
PART = Part(
    name="screen",
    point=13,
    promise="A closed pipe, a closed terminal or a full disk under the output costs its lines only; "
    "SIGHUP saves and leaves, unless nohup ignores it.",
    cases={trial.name: partial(run, trial) for trial in TRIALS},
    short=("closed_pipe_python", "closed_terminal_python"),
    summary=lambda figures: {"runs": len(figures), "steps_lost": sum(one["steps_lost"] for one in figures)},
)
