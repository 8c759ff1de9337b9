"""Started by the part `storage`: saves of two ranks, each refused by the disk at another operation.

`python drive_storage.py ARGUMENTS OUT.json` under torchrun, with the arguments of `run` as JSON. A save of one rank is
a row of operations: folders and files that are made, writes, flushes, renames. In trial N the disk refuses from the
N-th of rank `where` on, or only there (EIO); every `stride`-th is tried, the first and the last always. Trials take
turns between the policies `continue` and `stop`. Rank 0 writes figures; a broken promise is in `broken`, in words.
"""

import errno
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.campaign.drive_faults import batches, build, state_sha256
from benchmarks.campaign.launching import logged
from benchmarks.ranks import build_saver, drive, gathered
from inheritune_ds.checkpoints.manifest import Checkpoint, examine, find_fault, published, step_of
from inheritune_ds.checkpoints.store import CheckpointStore
from inheritune_ds.distributed.world import World
from inheritune_ds.errors import StorageError

CASE = "zero1-fp32-1"
AUDITED = {"os.mkdir": 0, "os.rename": 1}
"""Events of Python's audit hooks that are operations, and which of their arguments is the path that is made."""


class Disk:
    """The disk below a folder, seen from this process: counts its operations and refuses one.

    Args:
        folder: Where operations count; for ENOSPC and EROFS a file system of its own.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ballast = folder / "ballast"
        self._counting = False
        self._kind, self._refused = "", 0
        self.count = 0
        self.busy = False
        sys.addaudithook(self._hear)
        for name in ("write", "fsync", "fdatasync"):
            setattr(os, name, self._counted(name, getattr(os, name)))

    @contextmanager
    def refusing(self, kind: str, number: int) -> Iterator[None]:
        """Refuse the operation of a number (from 1; 0: none) that a save does inside, then be well again."""
        self._kind, self._refused, self.count, self.busy = kind, number, 0, False
        self._counting = True
        try:
            yield
        finally:
            self._counting = False
            if number:  # the rank that has refused mends
                self._mend()

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._counting:
            return
        if event == "open" and isinstance(arguments[0], str) and _writes(arguments[1], arguments[2]):
            self._operation(arguments[0])
        elif event in AUDITED:
            self._operation(os.fspath(arguments[AUDITED[event]]))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(descriptor: int, *rest: Any) -> Any:
            if self._counting:
                self._operation(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
            return call(descriptor, *rest)

        counted.__name__ = name
        return counted

    def _operation(self, path: str) -> None:
        ours = Path(path).is_relative_to(self._folder) and not threading.current_thread().name.startswith("prune")
        if not ours:
            return
        self.count += 1
        if self.count != self._refused:
            return
        self._counting = False
        if self._kind == "EIO":
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        if self._kind == "ENOSPC":
            fill(self._ballast)
        elif self._kind == "EFBIG":
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        elif self._kind == "EROFS":
            # The kernel refuses this while any file is open for writing, as it would refuse an administrator.
            self.busy = _remount(self._folder.parent, "ro") != 0

    def _mend(self) -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        if self._kind == "EROFS" and self.count >= self._refused and not self.busy:
            assert _remount(self._folder.parent, "rw") == 0
        self._ballast.unlink(missing_ok=True)


def _writes(mode: str | None, flags: int) -> bool:
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or any(letter in (mode or "") for letter in "wax+")


def _remount(folder: Path, mode: str) -> int:
    return subprocess.run(["mount", "-o", f"remount,{mode}", str(folder)], check=False, capture_output=True).returncode


def fill(path: Path) -> None:
    """Write a file until the file system has no byte left."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    size = 1 << 20
    while size:
        try:
            os.write(descriptor, bytes(size))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            size //= 2
    os.close(descriptor)


class Trials:
    """Saves of one engine, refused one after the other."""

    def __init__(self, world: World, folder: Path, said: list[str], *, where: int, async_save: bool) -> None:
        self._world, self._where, self._kind = world, where, ""
        self._store = CheckpointStore(folder / "checkpoints", keep=1)
        self._store.folder.mkdir(parents=True, exist_ok=True)
        self._said = said
        how: dict[str, Any] = {"precision": "fp32", "async_save": async_save}
        self._by_policy = {
            policy: build_saver(world, self._store, on_save_error=policy, **how) for policy in ("continue", "stop")
        }
        self._engine = build(CASE, world)
        self._disk = Disk(folder)
        self._step = 0
        self._states: dict[int, str] = {}
        self.figures: dict[str, Any] = {"trials": 0, "refused": 0, "published": 0, "busy": 0, "operations": 0}
        self.figures["by_kind"] = {}
        self.broken: list[str] = []

    def run(self, kinds: list[str], stride: int) -> None:
        """Every `stride`-th operation of a save, refused in every way."""
        self._save("continue", 0)  # the first save creates folders
        _, operations = self._save("continue", 0)
        operations = gathered(self._world, operations)[self._where]
        self.figures["operations"] = operations
        for self._kind in kinds:
            before = self.figures["trials"]
            for number in sorted({*range(1, operations + 1, stride), operations}):
                self._trial(number)
            self.figures["by_kind"][self._kind] = self.figures["trials"] - before
        for checkpoints in self._by_policy.values():
            checkpoints.close()
        if self._world.is_main:
            self._store.claim_generation()
            self._look_for_leftovers("the next launch")
        self._engine.close()

    def _check(self, number: int, *, kept: bool, problem: str) -> None:
        if not kept:
            self.broken.append(f"{self._kind} at operation {number}: {problem}")

    def _save(self, policy: str, refused: int) -> tuple[bool, int]:
        """Train a step and save it: whether it was published, and this rank's operations."""
        from inheritune_ds.checkpoints.train_state import TrainState

        self._step += 1
        self._engine.train_step(batches(self._step, 1, self._world.rank), lr=1e-3)
        self._states[self._step] = state_sha256(self._engine)
        checkpoints = self._by_policy[policy]
        with self._disk.refusing(self._kind, refused if self._world.rank == self._where else 0):
            try:
                saved = checkpoints.save(self._engine, TrainState(step=self._step, tokens=0))
                saved = checkpoints.wait() and saved
            except StorageError as error:
                self._said.append(error.problem)
                saved = False
                self._check(refused, kept=policy == "stop", problem="the policy was continue, and the run ended")
            else:
                kept = saved or policy == "continue"
                self._check(refused, kept=kept, problem="the policy was stop, and the run went on")
            gathered(self._world, saved)  # the disk is mended when every rank has met the refusal
        return saved, self._disk.count

    def _trial(self, number: int) -> None:
        before = self._step
        self._said.clear()
        policy = "stop" if number % 2 else "continue"
        saved, _ = self._save(policy, number)
        answers = gathered(self._world, saved)
        self.figures["trials"] += 1
        self.figures["busy"] += any(gathered(self._world, self._disk.busy))
        self.figures["published" if saved else "refused"] += 1
        alike = len(set(answers)) == 1
        self._check(number, kept=alike, problem=f"the ranks disagree whether it was saved: {answers}")
        newest = gathered(self._world, self._look(number, before, saved=saved))[0]
        self._load(number, newest)
        again, _ = self._save("continue", 0)
        self._check(number, kept=again, problem=f"the next save has failed: {self._said}")
        if self._world.is_main:
            alone = [step_of(path) for path in published(self._store.folder)] == [self._step]
            self._check(number, kept=alone, problem="the next save did not take the place of the older ones")

    def _look(self, number: int, before: int, *, saved: bool) -> int:
        """Check the folder after a refusal, on rank 0; returns the step of the newest verified checkpoint."""
        if not self._world.is_main:
            return 0
        line = " ".join(self._said)
        newest = self._store.newest_intact()
        assert newest is not None
        # A renamed checkpoint counts, even if the pointer could not be written.
        steps = {self._step} if saved else {before, self._step}
        among = newest.state.step in steps
        self._check(number, kept=among, problem=f"{newest.path.name} is the newest, not one of {sorted(steps)}")
        faults = [fault for path in published(self._store.folder) if (fault := find_fault(path)) is not None]
        self._check(number, kept=not faults, problem=f"damaged ones are published: {faults}")
        if self._kind != "EROFS":  # from a read-only disk nothing can be removed before the next launch
            self._look_for_leftovers(f"{self._kind} at operation {number}")
        if not saved:
            self._check(number, kept=str(self._store.folder) in line, problem=f"no path in {line!r}")
            needed = self._kind not in ("ENOSPC", "EFBIG") or " bytes" in line
            self._check(number, kept=needed, problem=f"the bytes needed are not in {line!r}")
        return newest.state.step

    def _look_for_leftovers(self, when: str) -> None:
        if left := [path.name for path in self._store.folder.glob(".*.tmp")]:
            self.broken.append(f"{when}: left behind: {left}")

    def _load(self, number: int, step: int) -> None:
        checkpoint = examine(self._store.folder / f"step-{step:08d}")
        assert isinstance(checkpoint, Checkpoint), checkpoint
        self._by_policy["continue"].load(self._engine, checkpoint)
        same = state_sha256(self._engine) == self._states[step]
        self._check(number, kept=same, problem=f"step {step} does not load as it was saved")


def run(world: World, folder: str, kinds: list[str], stride: int, **options: Any) -> dict[str, Any]:
    """Figures of the trials, whose options are those of Trials; all ranks call it."""
    with logged() as said:
        trials = Trials(world, Path(folder), said, **options)
        trials.run(kinds, stride)
    broken = gathered(world, trials.broken)
    return {**trials.figures, "broken": [f"rank {rank}: {line}" for rank, lines in enumerate(broken) for line in lines]}


if __name__ == "__main__":
    drive(run, *sys.argv[1:])
