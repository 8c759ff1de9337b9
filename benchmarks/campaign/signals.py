"""Point 10: SIGTERM, SIGUSR1 or SIGINT to one rank, to all, twice, in any phase: it saves, and all ranks exit."""

import os
import signal
import time
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

from benchmarks.campaign.launching import RANKS, TROUBLED, Launched, Launcher, TinyRun, check_same, status
from benchmarks.campaign.part import Figures, Part
from inheritune_ds.checkpoints.store import CheckpointStore
from inheritune_ds.distributed.signals import EXIT_INTERRUPTED

Who = Literal["one", "all", "twice", "group"]
"""One rank; every rank; every rank, and again a second later; the launcher and all ranks, as Ctrl-C does."""
ALLOWED_S = 30.0
PAUSE_S = 3.0
LONG_PAUSE_S = 60.0
"""A preparation is not awaited."""
AGAIN_S = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
WHERE: dict[str, tuple[str, int, int | None]] = {
    "preparing": ("preparing", 0, None),
    "before_step_1": ("start", 0, None),
    "first_step": ("first_step", 1, 1),
    "steady": ("step", 3, 3),
    "save": ("save", 4, 5),
    "eval": ("validation", 6, 6),
}
"""Where the signal comes: the phase, the step from which on it is waited for, and the step that is saved then."""


@dataclass(frozen=True)
class Trial:
    """One signal at a place of WHERE; if `resumed`, the run is then finished and compared with an uninterrupted one."""

    launcher: Launcher
    where: str
    number: signal.Signals
    who: Who
    resumed: bool = False

    @property
    def name(self) -> str:
        """Name of the case."""
        return f"{self.where}_{self.number.name}_{self.who}" + ("_resumed" if self.resumed else "")


def run(trial: Trial, folder: Path) -> Figures:
    """Launch, signal, wait; check the end."""
    phase, at, saved = WHERE[trial.where]
    seconds = LONG_PAUSE_S if trial.where == "preparing" else PAUSE_S
    tiny = TinyRun(folder, trial.launcher)
    with tiny.started(script=TROUBLED, TROUBLE=f"pause:{phase}:{at}:{seconds}") as launched:
        marks = [folder / f"paused-{rank}" for rank in range(RANKS[trial.launcher])]
        launched.wait_for(lambda: all(mark.exists() for mark in marks))
        begun = time.monotonic()
        _send(trial, launched, [int(mark.read_text(encoding="utf-8")) for mark in marks])
        code = launched.wait(ALLOWED_S + 60.0)
        # The runner of deepspeed dies of a Ctrl-C at once, while the ranks still save.
        orphans = launched.orphans(max(ALLOWED_S - (time.monotonic() - begun), 0.0))
        left_s = time.monotonic() - begun
        assert orphans == [], f"processes stay: {orphans}"
        output = launched.output()
    assert left_s < ALLOWED_S, f"it took {left_s:.1f} s to leave\n{output[-6000:]}"
    _check_end(trial, code, output[-6000:], tiny.path, saved)
    if trial.resumed:
        tiny.to_end()
        stopped = tiny.set_aside()
        tiny.to_end()
        check_same(stopped, tiny.path, "a run that was never stopped has")
    return {"seconds_to_leave": round(left_s, 2), "exit_code": code}


def _send(trial: Trial, launched: Launched, ranks: list[int]) -> None:
    if trial.who == "group":
        os.killpg(launched.process.pid, trial.number)
        return
    # The rank that leads and the one that follows take turns in being the only one.
    chosen = ranks if trial.who != "one" else [ranks[sum(map(ord, trial.where + trial.number.name)) % len(ranks)]]
    for pid in chosen:
        os.kill(pid, trial.number)
    if trial.who == "twice":
        time.sleep(AGAIN_S)
        for pid in chosen:
            try:
                os.kill(pid, trial.number)
            except ProcessLookupError:  # it has left already
                continue


def _check_end(trial: Trial, code: int, output: str, run_folder: Path, saved: int | None) -> None:
    """Exit code, status and checkpoints."""
    left = status(run_folder)
    changes = trial.launcher == "torchrun"  # which makes every code but 0 a 1
    if (trial.number, trial.who) == (signal.SIGINT, "twice"):  # a second Ctrl-C ends it at once
        assert code == (1 if changes else EXIT_INTERRUPTED), f"exit code {code}\n{output}"
        return
    assert left["state"] == "requeue", f"{left}\n{output}"
    if trial.where == "preparing":
        assert left["exit_code"] == EXIT_INTERRUPTED, left
        # A launcher that gets the signal itself ends with a code of its own.
        assert trial.who == "group" or code == (1 if changes else EXIT_INTERRUPTED), f"exit code {code}\n{output}"
        return
    assert trial.who == "group" or code == 0, f"exit code {code}\n{output}"
    assert trial.who == "group" or "Traceback" not in output, output
    assert left["exit_code"] == 0, left
    newest = CheckpointStore(run_folder / "checkpoints", keep=3, keep_every=None).newest_intact()
    if saved is None:
        assert newest is None, f"{newest}: nothing was to be saved"
        assert left["step"] == 0, left
    else:
        assert newest is not None, output
        assert newest.path.name == f"step-{saved:08d}", f"{newest}\n{output}"
        assert left["step"] == saved, left


def trials(launcher: Launcher) -> list[Trial]:
    """Every place, signal and group of ranks; a few are resumed to the end."""
    targets: tuple[Who, ...] = ("all", "twice") if launcher == "python" else ("one", "all", "twice")
    found = [Trial(launcher, *words) for words in product(WHERE, SIGNALS, targets)]
    found.append(Trial(launcher, "steady", signal.SIGINT, "group"))
    someone: Who = "all" if launcher == "python" else "one"
    for where, number in (
        ("preparing", signal.SIGTERM),
        ("before_step_1", signal.SIGUSR1),
        ("save", signal.SIGTERM),
        ("eval", signal.SIGUSR1),
    ):
        found.append(Trial(launcher, where, number, someone, resumed=True))
    return found


def summary(figures: list[Figures]) -> Figures:
    """How long leaving took."""
    return {"longest_seconds_to_leave": max(one["seconds_to_leave"] for one in figures), "allowed_s": ALLOWED_S}


def _part(launcher: Launcher) -> Part:
    return Part(
        name=f"signals_{launcher}",
        point=10,
        promise="SIGTERM, SIGUSR1 or SIGINT to any rank, at any time: saved, every rank gone within 30 s, "
        f"status.json says requeue; under {launcher}",
        cases={trial.name: partial(run, trial) for trial in trials(launcher)},
        short=("steady_SIGTERM_all",) if launcher == "python" else ("steady_SIGTERM_one",),
        summary=summary,
    )


PARTS = tuple(_part(launcher) for launcher in ("python", "deepspeed", "torchrun"))
