"""Point 6: a full, limited, read-only or broken disk costs the current save and nothing else.

The cases of one rank's operations run in `drive_storage.py`; the others are runs of two ranks on a small tmpfs, which
needs root. Without root, those and the errors ENOSPC and EROFS are skipped, and the result says so.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.campaign.drive_storage import fill
from benchmarks.campaign.launching import Launched, TinyRun, logged, publish_made, run_to_end, status, weights_sha256
from benchmarks.campaign.part import Cases, Figures, Part
from inheritune_ds.checkpoints.manifest import POINTER, find_fault, published, read_manifest
from inheritune_ds.checkpoints.retention import prune
from inheritune_ds.checkpoints.store import CheckpointStore
from inheritune_ds.errors import StorageError
from inheritune_ds.storage.files import read_json
from inheritune_ds.tracking.metrics import read_metrics

EXIT_STORAGE = StorageError.exit_code
STEPS, INTERVAL = 100, 10


@cache
def can_mount() -> bool:
    """Whether this process may mount a tmpfs."""
    with tempfile.TemporaryDirectory() as folder:
        mounted = _mount(Path(folder), 1 << 20)
        if mounted:
            subprocess.run(["umount", folder], check=True)
    return mounted


def _mount(folder: Path, size: int) -> bool:
    line = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return os.geteuid() == 0 and subprocess.run(line, check=False, capture_output=True).returncode == 0


@contextmanager
def disk(folder: Path, size: int = 1 << 25) -> Iterator[Path]:
    """A file system of `size` bytes below a folder; a plain folder without the right to mount."""
    place = folder / "disk"
    place.mkdir()
    mounted = can_mount() and _mount(place, size)
    try:
        yield place
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(place)], check=True)


def leave(place: Path, free: int) -> Path:
    """Fill a file system up to `free` bytes; returns the file that fills it."""
    ballast = place / "ballast"
    with ballast.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(place).free - free)
    return ballast


def operations(scratch: Path, *, rank: int, stride: int, kinds: Sequence[str], async_save: bool = False) -> Figures:
    """Refuse the operations of a rank's saves, one trial each."""
    with disk(scratch) as place:
        (place / "run").mkdir()
        out, given = scratch / "out.json", {"kinds": kinds, "where": rank, "stride": stride, "async_save": async_save}
        words = json.dumps({"folder": str(place / "run"), **given})
        run_to_end(scratch, words, str(out), script="benchmarks/campaign/drive_storage.py", launcher="torchrun")
        figures: Figures = read_json(out)
    broken = figures.pop("broken")
    assert not broken, "\n".join(broken)
    return figures


class Trial(TinyRun):
    """A run that saves often, its straight run on another disk, and how a launch on the small disk begins."""

    def __init__(self, scratch: Path, place: Path, policy: str) -> None:
        config: Any = {"reliability": {"on_save_error": policy}}
        sections: Any = {
            "training": {"seq_len": 32, "global_batch_tokens": 512, "duration": f"{STEPS} steps"},
            "checkpoint": {"interval_steps": INTERVAL, "keep": 1},
            "validation": {"interval_steps": STEPS, "max_tokens": 1024},
        }
        super().__init__(scratch, "deepspeed", runs=f"{place.name}/runs", config=config, **sections)
        self.store = CheckpointStore(self.path / "checkpoints", keep=1)
        straight = TinyRun(scratch, "deepspeed", config=config, **sections)
        straight.to_end()
        self.straight = weights_sha256(straight.path)
        manifest = read_manifest(next(published(straight.path / "checkpoints")))
        assert manifest is not None
        self.bytes = sum(entry["bytes"] for entry in manifest["files"].values())

    @contextmanager
    def launched(self) -> Iterator[Launched]:
        """A launch on the small disk that has saved its first checkpoint."""
        with self.started() as launch:
            launch.wait_for((self.path / "checkpoints" / POINTER).is_file)
            yield launch

    def newest_step(self) -> int:
        """Step of the newest checkpoint, which is whole; nothing half written lies beside it."""
        newest = self.store.newest_intact()
        assert newest is not None
        left = [path.name for path in self.store.folder.glob(".*.tmp")]
        assert left == [], f"left behind: {left}"
        return newest.state.step

    def is_refused(self, launch: Launched) -> str:
        """A launch ends with the code of a refusing disk, without leaving a process; its output."""
        code, output = launch.wait(), launch.output()
        assert code == EXIT_STORAGE, f"exit code {code}\n{output[-4000:]}"
        assert (left := launch.orphans()) == [], left
        return output

    def resume(self) -> None:
        """Rerun the same command with space again: the result is bitwise identical."""
        self.to_end()
        assert weights_sha256(self.path) == self.straight, "the weights differ from those of the straight run"

    def reported(self, output: str) -> str:
        """The line of a launch that reports the refusal, with the folder and the bytes."""
        line = next((line for line in output.splitlines() if str(self.path) in line and " bytes" in line), "")
        assert line, f"no line names the path and the bytes\n{output[-4000:]}"
        return line


def full_and_continue(scratch: Path) -> Figures:
    """Too little space for a while: the run trains on, says so, and saves again when there is space."""
    with disk(scratch) as place:
        trial = Trial(scratch, place, "continue")
        with trial.launched() as launch:
            ballast = leave(place, trial.bytes // 2)
            launch.wait_for(lambda: launch.output().count("NOT saved") >= 2)
            held = trial.newest_step()
            ballast.unlink()
            assert launch.wait() == 0, launch.output()[-4000:]
            output = launch.output()
        line = trial.reported(output)
        assert "WARNING" in line, line
        assert trial.newest_step() == STEPS
        assert weights_sha256(trial.path) == trial.straight
        return {"refused_saves": output.count("NOT saved"), "held_step": held}


def full_and_stop(scratch: Path) -> Figures:
    """Too little space under the policy `stop`: exit code, status, message; the same command resumes."""
    with disk(scratch) as place:
        trial = Trial(scratch, place, "stop")
        with trial.launched() as launch:
            ballast = leave(place, trial.bytes // 2)
            output = trial.is_refused(launch)
        trial.reported(output)
        found = status(trial.path)
        assert (found["state"], found["exit_code"]) == ("failed", EXIT_STORAGE), found
        step = trial.newest_step()
        assert found["saved_step"] == step, found
        ballast.unlink()
        trial.resume()
        return {"stopped_after_step": step}


def not_a_byte_left(scratch: Path) -> Figures:
    """A full disk that also holds metrics.jsonl: the run exits with the storage code and loses no checkpoint."""
    with disk(scratch) as place:
        trial = Trial(scratch, place, "continue")
        with trial.launched() as launch:
            fill(place / "ballast")
            output = trial.is_refused(launch)
        assert "No space left on device" in output, output[-4000:]
        step = trial.newest_step()
        state = status(trial.path)
        (place / "ballast").unlink()
        trial.resume()
        return {"newest_step": step, "status": state["state"]}


def reported_before_training(scratch: Path) -> Figures:
    """Less than twice a checkpoint free, or a read-only disk: reported before the first step."""
    with disk(scratch) as place:
        trial = Trial(scratch, place, "continue")
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        output = trial.to_end(expect=EXIT_STORAGE)
        assert "Read-only file system" in output, output[-4000:]
        assert str(place) in output, output[-4000:]
        subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
        ballast = leave(place, int(1.5 * trial.bytes))
        output = trial.to_end(expect=EXIT_STORAGE)
        trial.reported(output)
        assert read_metrics(trial.path) == []
        assert list(published(trial.store.folder)) == []
        ballast.unlink()
        trial.resume()
        return {"checkpoint_bytes": trial.bytes}


def retention_on_a_full_disk(scratch: Path) -> Figures:
    """Pruning never deletes the only verified checkpoint: the newest is read before any older one goes."""
    with disk(scratch) as place:
        store = CheckpointStore(place / "checkpoints", keep=3)
        for step in (1, 2, 3):
            publish_made(store, step, {"state": bytes([step]) * 5000})
        (store.folder / "step-00000003" / "state").write_bytes(b"")  # as after a lost write
        if can_mount():
            fill(place / "ballast")
        strict = CheckpointStore(store.folder, keep=1)
        with logged() as lines:
            assert prune(strict) == []
        assert len(lines) == 1, lines
        assert "step-00000003 is damaged" in lines[0], lines
        newest = strict.newest_intact()
        assert newest is not None
        assert newest.state.step == 2
        (place / "ballast").unlink(missing_ok=True)
        publish_made(strict, 4, {"state": b"4" * 5000})
        if can_mount():
            fill(place / "ballast")
        with logged() as lines:
            assert len(prune(strict)) == 3, lines
        assert [find_fault(path) for path in published(store.folder)] == [None]
        return {"kept_while_damaged": 3}


def _cases() -> Cases:
    """All of them that this process may run."""
    kinds = [*(["ENOSPC"] if can_mount() else []), "EFBIG", "EIO"]
    cases: dict[str, Callable[[Path], Figures]] = {
        "retention": retention_on_a_full_disk,
        "some operations": partial(operations, rank=0, stride=25, kinds=kinds),
    }
    for rank in (0, 1):
        cases |= {f"rank {rank}, {kind}": partial(operations, rank=rank, stride=1, kinds=[kind]) for kind in kinds}
        background = partial(operations, rank=rank, stride=7, kinds=kinds, async_save=True)
        cases[f"rank {rank}, in the background"] = background
    if can_mount():
        cases |= {
            "rank 0, EROFS": partial(operations, rank=0, stride=1, kinds=["EROFS"]),
            "full and continue": full_and_continue,
            "full and stop": full_and_stop,
            "not a byte left": not_a_byte_left,
            "told before training": reported_before_training,
        }
    return cases


def summary(found: list[Figures]) -> dict[str, Any]:
    """Trials by the way the disk refused."""
    by_kind: dict[str, int] = {}
    for figures in found:
        for kind, trials in figures.get("by_kind", {}).items():
            by_kind[kind] = by_kind.get(kind, 0) + trials
    return {
        "refused_operations": by_kind,
        "saves_refused": sum(figures.get("refused", 0) for figures in found),
        "not_refused_while_files_were_open": sum(figures.get("busy", 0) for figures in found),
        "left_out": "" if can_mount() else "ENOSPC, EROFS and whole runs on a full disk: mounting needs root",
    }


PART = Part(
    name="storage",
    point=6,
    promise="A disk that refuses any operation of a save costs that save: the last good checkpoint loads, the partial "
    "one is removed, the message names the path and the bytes, and the run continues or stops as configured.",
    cases=_cases(),
    short=("retention", "some operations"),
    summary=summary,
)
