"""SIGKILL at seeded random instants: the same command resumes, and the result is that of an undisturbed run.

A case is a chain: one run of two ranks is killed again and again, each time at an instant of one of three kinds, and is
started by the same command each time; the last launch ends it. Killed is the launcher's whole group, as by a node that
fails, or one rank alone, as by the kernel when memory runs out. All chains end on the numbers of one run that was left
in peace.
"""

import os
import random
import re
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from benchmarks.campaign.launching import Launched, TinyRun, last_step, status, weights_sha256
from benchmarks.campaign.part import Cases, Figures, Part
from benchmarks.launch import kill as kill_group
from inheritune_ds.checkpoints.manifest import find_fault, published, step_of
from tests.launching import numerics

INTERVAL = 4
"""Steps between checkpoints."""
STEPS = 120
"""Enough for ten launches; each reaches at least one checkpoint more."""
STEPS_OF_SHORT = 24
SEED_OF_SHORT = 149
"""Its only kill of a save comes within a millisecond of the save's begin: no disk writes both files so fast."""
CHAINS = 10
"""Of both parts together: even seeds save while training waits, odd ones in the background."""
IN_SAVE_AT_LEAST = 4
"""Kills of a chain that must hit a save."""
Kind = Literal["save", "step", "start"]
LEAVE_S = 60.0
"""Seconds in which the launcher must have ended when one of its ranks was killed."""
_KINDS: tuple[Kind, ...] = ("save", "save", "save", "save", "save", "save", "step", "step", "step", "start")
"""Targets of the kills of a chain."""
_SAVING = re.compile(r"\.step-(\d{8})\.tmp")
_FILES = 2
"""A save of two ranks writes a file of each, and the manifest last."""


@dataclass(frozen=True)
class Kill:
    """An instant and a victim.

    Attributes:
        kind: `save`: during a save, after `count` files; `step`: `count` steps after the resume; `start`: after the
            launch.
        count: Files or steps.
        later: Saves of the launch to skip.
        wait_s: Further seconds.
        rank: The killed rank; None: the launcher's whole group.
    """

    kind: Kind
    count: int
    later: int
    wait_s: float
    rank: int | None


def draw_kills(seed: int, kinds: Sequence[Kind]) -> list[Kill]:
    """The kills of a chain, a function of the seed."""
    draw = random.Random(seed)  # noqa: S311 (repeatable on purpose)
    order = list(kinds)
    draw.shuffle(order)
    limits = {"save": (_FILES, 0.01), "step": (INTERVAL + 2, 0.05), "start": (0, 8.0)}
    kills = []
    for kind in order:
        count, wait_s = draw.randint(0, limits[kind][0]), draw.uniform(0.0, limits[kind][1])
        kills.append(Kill(kind, count, draw.randint(0, 2), wait_s, draw.choice((None, None, 0, 1))))
    return kills


def tiny_run(folder: Path, steps: int, *, asynchronous: bool) -> TinyRun:
    """The run of a chain: the same command at every launch."""
    return TinyRun(
        folder,
        "deepspeed",
        config={"reliability": {"async_save": asynchronous}},
        training={"seq_len": 32, "global_batch_tokens": 512, "duration": f"{steps} steps"},
        validation={"interval_steps": steps // 2, "max_tokens": 512},
        checkpoint={"interval_steps": INTERVAL},
    )


@cache
def undisturbed(steps: int) -> tuple[str, list[dict[str, Any]]]:
    """sha256 of the weights and numbers of the run that was left in peace; both ways of saving give the same."""
    with tempfile.TemporaryDirectory() as name:
        tiny = tiny_run(Path(name), steps, asynchronous=False)
        tiny.to_end()
        return weights_sha256(tiny.path), numerics(tiny.path)


def strike(launched: Launched, run: Path, kill: Kill, kept: int, *, asynchronous: bool) -> Figures | None:
    """Wait for the instant and kill; None if the run ended before. `kept` is the checkpoint that it went on from.

    Returns:
        `saving`: Step of the save whose temporary folder was there. `logged`: Last step in metrics.jsonl. `kept`: Step
        of the newest verified checkpoint; 0 for none. `lost`: Steps that the next launch repeats. `leave_s`: Seconds
        until the launcher had ended.
    """
    if not _wait(launched, run, kill, kept):
        return None
    victim = None if kill.rank is None else launched.ranks().get(kill.rank)
    begun_s = time.monotonic()
    if victim is None:
        kill_group(launched.process)
    else:
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    saving = _saving(run, launched)
    code = launched.wait(LEAVE_S)
    leave_s = time.monotonic() - begun_s
    if victim is not None and code == 0:
        return None  # the rank had ended by itself
    assert (left := launched.orphans()) == [], f"after {kill}: processes stay: {left}"
    kept = next((step_of(folder) for folder in published(run / "checkpoints") if find_fault(folder) is None), 0)
    logged = last_step(run)
    blow = {
        "kind": kill.kind,
        "rank": kill.rank if victim is not None else None,
        "in_save": saving is not None,
        "saving": saving,
        "logged": logged,
        "kept": kept,
        "leave_s": round(leave_s, 2),
        "lost": max(logged, 0) - kept,
    }
    # An async save runs beside the next steps and begins a moment after its own, which counts.
    reached = saving if saving is not None else logged - logged % INTERVAL if asynchronous else logged
    assert reached - kept <= INTERVAL, f"after {kill}: {blow} has lost more than {INTERVAL} steps"
    return blow


def _saving(run: Path, launched: Launched, files: int = 0) -> int | None:
    """Step of the present save of this launch, once it has `files` files; leftovers of earlier ones do not count."""
    for folder in (run / "checkpoints").glob(".step-*.tmp"):
        name = _SAVING.fullmatch(folder.name)  # others of that pattern are being deleted
        with suppress(FileNotFoundError):  # published at this moment
            if name and folder.stat().st_mtime >= launched.begun_s and len(list(folder.rglob("*"))) >= files:
                return int(name.group(1))
    return None


def _wait(launched: Launched, run: Path, kill: Kill, kept: int) -> bool:
    """Whether the instant came before the run ended."""
    first: int | None = None

    def goes_on() -> bool:
        return "resumed from" in launched.output() or "step 0: val loss" in launched.output()

    def has_come() -> bool:
        nonlocal first
        if launched.process.poll() is not None or kill.kind == "start":
            return True
        if kill.kind == "save":
            return (_saving(run, launched, kill.count) or 0) > kept + kill.later * INTERVAL
        if first is None:
            first = last_step(run) if goes_on() else None
        return first is not None and last_step(run) >= first + kill.count

    launched.wait_for(has_come)
    time.sleep(kill.wait_s)
    return launched.process.poll() is None


def chain(folder: Path, *, seed: int, kinds: Sequence[Kind], steps: int, asynchronous: bool) -> Figures:
    """Kill one run again and again, then let it end."""
    tiny = tiny_run(folder, steps, asynchronous=asynchronous)
    blows: list[Figures] = []
    kept = 0
    for kill in draw_kills(seed, kinds):
        with tiny.started() as launched:
            blow = strike(launched, tiny.path, kill, kept, asynchronous=asynchronous)
            output = launched.output()
        assert blow is not None, f"{kill} came too late: the run ended before\n{output[-3000:]}"
        check_start(output, kept)
        kept = blow["kept"]
        blows.append(blow)
    check_start(tiny.to_end(), kept)
    check_end(folder, tiny.path, steps)
    in_save = sum(blow["in_save"] for blow in blows)
    assert in_save >= min(IN_SAVE_AT_LEAST, kinds.count("save")), f"only {in_save} kills have hit a save: {blows}"
    return {"kills": blows, "seed": seed, "async": asynchronous}


def check_start(output: str, kept: int) -> None:
    """A launch resumes from the newest verified checkpoint, if it lives long enough, and never starts over."""
    found = re.search(r"resumed from \S+ \(step (\d+)", output)
    if found is not None:
        assert int(found.group(1)) == kept, f"resumed from step {found.group(1)}, not {kept}\n{output[-3000:]}"
    assert kept == 0 or "step 0: val loss" not in output, f"started over at step {kept}\n{output[-3000:]}"


def check_end(folder: Path, run: Path, steps: int) -> None:
    """The run ended with the numbers of the undisturbed one, and left nothing that it would not have left."""
    sha256, rows = undisturbed(steps)
    assert status(run)["state"] == "finished", status(run)
    assert weights_sha256(run) == sha256, "the weights are not those of the undisturbed run"
    found = numerics(run)
    differing = [(one, other) for one, other in zip(found, rows, strict=False) if one != other]
    assert found == rows, f"{len(found)} rows and {len(rows)}; the first that differ: {differing[:1]}"
    strays = [path for path in (*run.rglob("*"), *(folder / "cache").rglob("*")) if "tmp" in path.name]
    assert strays == [], f"stray files: {strays}"


def _cases(*, asynchronous: bool) -> Cases:
    killed = partial(chain, asynchronous=asynchronous)
    kinds: tuple[Kind, ...] = ("save",) if asynchronous else ("save", "step")
    return {
        **{
            f"seed-{seed}": partial(killed, seed=seed, kinds=_KINDS, steps=STEPS)
            for seed in range(asynchronous, CHAINS, 2)
        },
        "short": partial(killed, seed=SEED_OF_SHORT, kinds=kinds, steps=STEPS_OF_SHORT),
    }


def _summary(figures: list[Figures]) -> dict[str, Any]:
    kills = [kill for found in figures for kill in found["kills"]]
    in_save = sum(kill["in_save"] for kill in kills)
    return {
        "kills": len(kills),
        "in_save": in_save,
        "of_one_rank": sum(kill["rank"] is not None for kill in kills),
        "by_aim": {kind: sum(kill["kind"] == kind for kill in kills) for kind in ("save", "step", "start")},
        "steps_between_checkpoints": INTERVAL,
        "most_steps_repeated": max((kill["lost"] for kill in kills), default=0),
        "longest_end_s": max((kill["leave_s"] for kill in kills), default=0.0),
    }


def _part(*, asynchronous: bool) -> Part:
    repeated = "at most one interval" + (" and the steps done while the last save was written" if asynchronous else "")
    return Part(
        name="kills_async" if asynchronous else "kills_sync",
        point=2,
        promise=f"A run killed at any instant resumes by the same command, repeats {repeated}, and ends the same; "
        f"it saves {'in the background' if asynchronous else 'while training waits'}.",
        cases=_cases(asynchronous=asynchronous),
        short=("short",),
        summary=_summary,
    )


PARTS = tuple(_part(asynchronous=asynchronous) for asynchronous in (False, True))
