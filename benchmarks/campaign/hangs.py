"""Point 9: a rank that hangs ends the job in time, with every rank's stacks; the same command resumes."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.campaign.launching import RANKS, TROUBLED, Launcher, TinyRun, status
from benchmarks.campaign.part import Figures, Part
from inheritune_ds.errors import HangError
from inheritune_ds.tracking.metrics import read_metrics

LIMIT_S = 6.0
MARGIN_S = 10.0
STEPS, INTERVAL = 12, 4
"""Of the tiny recipe: steps, and those from one checkpoint to the next."""
EXPECTED = {
    "start": ("start", "start", 0),
    "first_step": ("first_step", "first_step", 1),
    "forward": ("step", "step", 6),
    "interpreter": ("step", "step", 6),
    "data": ("data", "step", 7),
    "collective": ("step", "step", 6),
    "wandb": ("log", "step", 6),
    "wandb_finish": ("finish", "finish", STEPS),
    "validation": ("validation", "validation", 6),
    "save": ("save", "save", 8),
    "finish": ("finish", "finish", STEPS),
}
"""Place of the sleep -> the reported phase, the limit that applies, the step."""


@dataclass(frozen=True)
class Hang:
    """One trial: where, on which rank of how many, under which launcher."""

    place: str
    launcher: Launcher
    rank: int = 0

    @property
    def name(self) -> str:
        """Name of the case."""
        return f"{self.place}_{self.launcher}" + (f"_rank{self.rank}" if RANKS[self.launcher] > 1 else "")


HANGS = (
    Hang("forward", "python"),
    Hang("forward", "deepspeed", 1),
    Hang("forward", "torchrun", 0),
    Hang("data", "python"),
    Hang("data", "deepspeed", 0),
    Hang("data", "torchrun", 1),
    Hang("collective", "deepspeed", 0),
    Hang("collective", "deepspeed", 1),
    Hang("collective", "torchrun", 1),
    Hang("wandb", "python"),
    Hang("wandb", "deepspeed"),
    Hang("wandb", "torchrun"),
    Hang("wandb_finish", "deepspeed"),
    Hang("start", "torchrun", 1),
    Hang("first_step", "deepspeed", 1),
    Hang("validation", "deepspeed", 1),
    Hang("save", "torchrun", 1),
    Hang("finish", "deepspeed"),
    Hang("interpreter", "python"),
)


def run(hang: Hang, folder: Path) -> Figures:
    """Launch, wait for the sleep and the end, check the end; then rerun the same command."""
    _, limit, step = EXPECTED[hang.place]
    tiny = TinyRun(folder, hang.launcher, config={"reliability": {"watchdog_s": {limit: LIMIT_S}}})
    tracker = {"WANDB_MODE": "offline"} if hang.place.startswith("wandb") else {}
    with tiny.started(script=TROUBLED, TROUBLE=f"hang:{hang.place}:{hang.rank}", **tracker) as launched:
        launched.wait_for((folder / "hung").exists)
        code = launched.wait(LIMIT_S + 60.0)
        seconds = time.time() - float((folder / "hung").read_text(encoding="utf-8"))
        assert (left := launched.orphans()) == [], f"processes stay: {left}"
        _check_end(hang, launched.output()[-6000:], tiny.path, code)
    assert seconds < LIMIT_S + MARGIN_S, f"it took {seconds:.1f} s to end"
    resumed = tiny.to_end(**tracker)
    assert status(tiny.path)["state"] == "finished"
    steps = [row["step"] for row in read_metrics(tiny.path) if "train/loss" in row]
    assert steps == list(range(1, STEPS + 1)), f"steps of metrics.jsonl: {steps}"
    saved = STEPS if limit == "finish" else max(step - 1, 0) // INTERVAL * INTERVAL
    as_expected = f"(step {saved}," in resumed if saved else "resumed from" not in resumed
    assert as_expected, f"the run should resume from step {saved}\n{resumed[-3000:]}"
    return {"seconds_after_limit": round(seconds - LIMIT_S, 2), "exit_code": code}


def _check_end(hang: Hang, output: str, run_folder: Path, code: int) -> None:
    """Exit code, status and stacks of a job that has ended."""
    phase, _, step = EXPECTED[hang.place]
    if hang.place == "interpreter":  # no code of ours can run: faulthandler ends it
        assert code == 1, output
        assert "Timeout (" in output, output
        assert "hold_the_interpreter" in output, output
        return
    assert code == (1 if hang.launcher == "torchrun" else HangError.exit_code), f"exit code {code}\n{output}"
    left = status(run_folder)
    assert (left["state"], left["exit_code"]) == ("failed", HangError.exit_code), f"{left}\n{output}"
    # A rank that waits for the sleeping one exceeds its limit at the same time, and may report first.
    assert left["reason"].startswith("hang in "), left
    for rank in range(RANKS[hang.launcher]):
        (path,) = (run_folder / "logs").glob(f"hang-*-rank-{rank:05d}.txt")
        stacks = path.read_text(encoding="utf-8")
        assert "most recent call first" in stacks, stacks
        if rank == hang.rank:
            assert f"is in {phase} at step {step}\n" in stacks, stacks
            assert "in sleep_for_ever" in stacks, stacks


def summary(figures: list[Figures]) -> Figures:
    """How late a job ended."""
    late = [one["seconds_after_limit"] for one in figures]
    return {"limit_s": LIMIT_S, "latest_end_after_limit_s": max(late), "allowed_s": MARGIN_S}


PART = Part(
    name="hangs",
    point=9,
    promise="a rank that hangs ends the job within its limit + 10 s, with the stacks of every rank and no process left",
    cases={hang.name: partial(run, hang) for hang in HANGS},
    short=("forward_python",),
    summary=summary,
)
