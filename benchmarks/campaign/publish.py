"""Point 3: the pointer never names a checkpoint that is incomplete, whichever writer is slow, refused or killed."""

import json
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self

from benchmarks.campaign.launching import Launched, started
from benchmarks.campaign.part import Cases, Figures, Part, totals
from inheritune_ds.checkpoints.fragments import file_name
from inheritune_ds.checkpoints.manifest import POINTER, find_fault
from inheritune_ds.checkpoints.store import CheckpointStore
from inheritune_ds.errors import TrainingError
from tests.launching import free_port, torchrun_variables

RANKS = 2
DRIVER = "benchmarks/campaign/drive_saves.py"
POLL_S = 0.01
_TEXTS = [(0, "manifest.json"), (0, POINTER)]
_COUNTED = ("faults", "looks", "incomplete", "deepspeed_looks", "deepspeed_incomplete")
Listing = dict[str, int]


_FILES = [(rank, file_name(rank)) for rank in range(RANKS)] + _TEXTS
"""Ranks and the files that they write."""


class Poller:
    """Reads the pointer and lists its checkpoint every 10 ms: `seen`, and the longest time between two readings."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.seen: list[tuple[str, Listing]] = []
        self._ended, self._threads = threading.Event(), ThreadPoolExecutor(1)
        self.longest_gap_s = 0.0

    def __enter__(self) -> Self:
        self._polling = self._threads.submit(self._poll)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._threads.shutdown()
        self._polling.result()  # raises an error of the watch

    def _poll(self) -> None:
        last_s = time.monotonic()
        while not self._ended.wait(POLL_S):
            self._look()
            now_s = time.monotonic()
            self.longest_gap_s, last_s = max(self.longest_gap_s, now_s - last_s), now_s
        self._look()

    def _look(self) -> None:
        try:
            name = (self._folder / POINTER).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return
        self.seen.append((name, _listing(self._folder / name)))

    def incomplete(self) -> list[str]:
        """Looks at which a file was missing, or shorter than it is now that all writers have ended."""
        found = []
        for number, (name, listing) in enumerate(self.seen):
            whole = _listing(self._folder / name)
            wrong = [file for file, size in whole.items() if listing.get(file) != size]
            if wrong or not whole:
                found.append(f"look {number}: {POINTER} names {name}, but {', '.join(wrong) or 'it'} is not complete")
        return found


def _listing(folder: Path) -> Listing:
    """Files below a folder and their sizes."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def _launch(folder: Path, plan: Mapping[str, Any]) -> tuple[list[Launched], list[int], Poller, Poller]:
    """Let two ranks save as planned while both folders are watched; the ranks, their exit codes, the watchers."""
    path = folder / "plan.json"
    path.write_text(json.dumps(plan), encoding="utf-8")
    port = free_port()
    with ExitStack() as stack:
        watch = stack.enter_context(Poller(folder / "checkpoints"))
        native = stack.enter_context(Poller(folder / "native"))
        ranks = []
        for rank in range(RANKS):
            # without a launcher, which would end the other rank before it can report
            variables: dict[str, Any] = torchrun_variables(rank, RANKS, port)
            run = started(folder, str(folder), str(path), script=DRIVER, **variables)
            ranks.append(stack.enter_context(run))
        codes = [launched.wait() for launched in ranks]
    return ranks, codes, watch, native


def _check(folder: Path, watch: Poller) -> None:
    incomplete = watch.incomplete()
    assert not incomplete, f"{len(incomplete)} of {len(watch.seen)} looks\n" + "\n".join(incomplete[:20])
    assert len(watch.seen), "there was nothing to look at"
    faults = {name: find_fault(folder / "checkpoints" / name) for name in {name for name, _ in watch.seen}}
    assert not any(faults.values()), faults


def _slow_and_refused(folder: Path, *, stage: int, background: bool) -> Figures:
    """Delay, then refuse every file in turn, a good save after each; at last DeepSpeed's own save, with a delay."""
    faults = [{"rank": rank, "file": file, "action": action} for rank, file in _FILES for action in ("delay", "refuse")]
    after = [entry for fault in faults for entry in (fault, None)]
    plan = {"stage": stage, "async": background, "faults": after, "native": True}
    ranks, codes, watch, native = _launch(folder, plan)
    output = "\n".join(launched.output()[-3000:] for launched in ranks)
    assert codes == [0, 0], f"exit codes {codes}\n{output}"
    _check(folder, watch)
    answers = [json.loads((folder / f"result-{rank}.json").read_text(encoding="utf-8")) for rank in range(RANKS)]
    # A pointer that is refused costs nothing: the checkpoint has its name by then.
    costs = [fault is not None and fault["action"] == "refuse" and fault["file"] != POINTER for fault in after]
    wanted = [True, *(not cost for cost in costs)]
    assert answers == [wanted, wanted], f"saves have answered {answers}\n{output}"
    assert not list((folder / "checkpoints").glob(".step-*")), "unpublished folders remain"
    missed = native.incomplete()
    # In stage 3 it gathers parameters behind its files, so all ranks meet before the pointer moves.
    assert missed or stage == 3, f"DeepSpeed's own save was never seen incomplete in {len(native.seen)} looks"
    return {
        "faults": len(faults),
        "looks": len(watch.seen),
        "incomplete": 0,
        "deepspeed_looks": len(native.seen),
        "deepspeed_incomplete": len(missed),
        "longest_gap_s": watch.longest_gap_s,
    }


def _killed(folder: Path, *, stage: int, background: bool, rank: int, file: str) -> Figures:
    """Kill a rank in the middle of a file; the other one ends by itself, and the checkpoint before is still good."""
    fault = {"rank": rank, "file": file, "action": "kill"}
    plan = {"stage": stage, "async": background, "faults": [fault], "native": False}
    ranks, codes, watch, _ = _launch(folder, plan)
    other = 1 - rank
    output = ranks[other].output()[-3000:]
    assert codes[rank] == -9, f"rank {rank} was not killed but ended with {codes[rank]}\n{ranks[rank].output()[-3000:]}"
    assert codes[other] == TrainingError.exit_code, f"rank {other} ended with {codes[other]}\n{output}"
    assert "the ranks have lost each other while they saved step 2" in output, output
    _check(folder, watch)
    store = CheckpointStore(folder / "checkpoints", keep=3)
    store.claim_generation()
    newest = store.newest_intact()
    # The pointer is written after the rename, so step 2 is published by then.
    assert newest is not None
    assert newest.path.name == ("step-00000002" if file == POINTER else "step-00000001")
    left = [path.name for path in (folder / "checkpoints").glob(".*")]
    assert not left, f"the next launch leaves {left}"
    return {"faults": 1, "looks": len(watch.seen), "incomplete": 0, "longest_gap_s": watch.longest_gap_s}


def _cases() -> Cases:
    cases = {}
    for stage in (1, 3):
        for background in (False, True):
            kind = f"zero{stage}-{'async' if background else 'sync'}"
            cases[f"{kind}-slow-and-refused"] = partial(_slow_and_refused, stage=stage, background=background)
            for rank, file in _FILES:
                killed = partial(_killed, stage=stage, background=background, rank=rank, file=file)
                cases[f"{kind}-killed-{rank}-{file}"] = killed
    return cases


PART = Part(
    name="publish",
    point=3,
    promise="The pointer never names a checkpoint that is not complete, whichever rank's writer is slow, refused or "
    "killed at whichever file; the same check catches DeepSpeed's own save.",
    cases=_cases(),
    short=("zero1-sync-slow-and-refused",),
    summary=totals(*_COUNTED, most=("longest_gap_s",)),
)
