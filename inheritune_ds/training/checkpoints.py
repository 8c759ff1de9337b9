"""Checkpoints: written beside, verified, then published by one rename; the newest good one is resumed."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from inheritune_ds.errors import CheckpointError
from inheritune_ds.files import read_json, sha256_file, storage_errors, sync_folder, sync_path, write_json
from inheritune_ds.publish import describe_files
from inheritune_ds.training.world import World

MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{8})")


class Stateful(Protocol):
    """What is saved: the engine."""

    def save(self, folder: Path) -> None:
        """Write this rank's share below a folder."""

    def load(self, folder: Path) -> None:
        """Restore this rank's share."""


@dataclass(frozen=True)
class RunState:
    """Where a run stands; everything else (order of data, learning rate, randomness) follows from the step.

    Attributes:
        step: Optimizer updates done.
        tokens: Tokens seen.
        skipped_steps: Updates that the engine left out.
        train_seconds: Time spent in optimizer steps, over all launches that count.
    """

    step: int
    tokens: int
    skipped_steps: int
    train_seconds: float


@dataclass(frozen=True)
class Layout:
    """What a DeepSpeed state depends on; it loads only into the same layout.

    Attributes:
        world_size: Number of ranks.
        zero_stage: ZeRO stage.
        precision: fp32, bf16 or fp16.
    """

    world_size: int
    zero_stage: int
    precision: str


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: `checkpoints/` of the run folder.
        layout: Of this launch.
        world: This rank among all.
        keep: How many of the newest stay.
        say: Prints one line for the user.
    """

    def __init__(self, folder: Path, *, layout: Layout, world: World, keep: int, say: Callable[[str], None]) -> None:
        self._folder, self._layout, self._world, self._keep, self._say = folder, layout, world, keep, say

    def save(self, engine: Stateful, state: RunState) -> None:
        """Publish a checkpoint; all ranks must call it together.

        Raises:
            StorageError: If the disk refuses; the older checkpoints stay as they are.
        """
        final = self._folder / f"step-{state.step:08d}"
        temporary = self._folder / f".{final.name}.tmp"
        with storage_errors(self._folder):
            if self._world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            dist.barrier()
            try:
                engine.save(temporary)
                dist.barrier()  # DeepSpeed returns on each rank when that rank's own files are written
                if self._world.is_main:
                    self._publish(temporary, final, state)
                dist.barrier()
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise

    def _publish(self, temporary: Path, final: Path, state: RunState) -> None:
        files = describe_files(temporary)
        sync_folder(temporary)
        manifest = {"state": asdict(state), "layout": asdict(self._layout), "files": files}
        write_json(temporary / MANIFEST, {**manifest, "sha256": _digest(manifest)})
        shutil.rmtree(final, ignore_errors=True)  # left by a launch that saved the same step
        temporary.rename(final)
        sync_path(self._folder)
        for old in list(published(self._folder))[self._keep :]:
            shutil.rmtree(old)

    def resume(self, engine: Stateful) -> RunState | None:
        """Restore the newest checkpoint whose files are all intact; None if there is none at all.

        Raises:
            CheckpointError: On all ranks, if checkpoints exist and none is intact, or if the newest intact
                one was saved with another number of ranks, ZeRO stage or precision.
        """
        choice: list[Path | CheckpointError | None] = [None]
        if self._world.is_main:
            self._remove_leftovers()
            try:
                choice = [self._newest_intact()]
            except CheckpointError as error:
                choice = [error]
        dist.broadcast_object_list(choice)
        chosen = choice[0]
        if isinstance(chosen, CheckpointError):
            raise chosen
        if chosen is None:
            return None
        state = RunState(**read_json(chosen / MANIFEST)["state"])
        engine.load(chosen)
        self._say(f"resumed from {chosen} (step {state.step}, {state.tokens:,} tokens)")
        return state

    def _newest_intact(self) -> Path | None:
        bad: list[str] = []
        for folder in published(self._folder):
            fault = find_fault(folder)
            if fault is None:
                _check_layout(folder, self._layout)
                return folder
            bad.append(f"{folder.name}: {fault}")
            self._say(f"WARNING: checkpoint {folder} is damaged and is passed over: {fault}")
        if bad:
            raise CheckpointError(
                f"no checkpoint in {self._folder} can be used: {'; '.join(bad)}",
                action="bring an intact copy back, or start over in another folder (--runs-dir or name=...)",
            )
        return None

    def _remove_leftovers(self) -> None:
        """Remove what a launch that was killed while saving has left; nobody else saves here."""
        for folder in self._folder.glob(".step-*.tmp"):
            shutil.rmtree(folder, ignore_errors=True)


def refuse_other_layout(folder: Path, layout: Layout) -> None:
    """Compare a layout with that of the newest checkpoint with an intact manifest, before anything is prepared.

    Args:
        folder: `checkpoints/` of a run folder.
        layout: Of this launch.

    Raises:
        CheckpointError: Naming what differs.
    """
    newest = next((path for path in published(folder) if _manifest(path) is not None), None)
    if newest is not None:
        _check_layout(newest, layout)


def _check_layout(folder: Path, layout: Layout) -> None:
    saved = read_json(folder / MANIFEST)["layout"]
    current = asdict(layout)
    differing = [f"{key} {saved[key]} there, {current[key]} now" for key in current if saved[key] != current[key]]
    if differing:
        raise CheckpointError(
            f"{folder} was saved under another layout: {', '.join(differing)}",
            allowed="the same number of ranks, ZeRO stage and precision as when it was saved",
            action="start with the same launcher line and DeepSpeed config as before",
        )


def published(folder: Path) -> Iterator[Path]:
    """Published checkpoints, the newest first."""
    if folder.is_dir():
        yield from sorted((path for path in folder.iterdir() if NAME.fullmatch(path.name)), reverse=True)


def newest_step(folder: Path) -> int:
    """Step of the newest published checkpoint; 0 if there is none."""
    newest = next(published(folder), None)
    return int(newest.name.removeprefix("step-")) if newest else 0


def find_fault(folder: Path) -> str | None:
    """What is wrong with a published checkpoint: a missing, changed or resized file; None if intact."""
    manifest = _manifest(folder)
    if manifest is None:
        return f"{MANIFEST} is missing or not as it was written"
    faults = (_file_fault(folder, name, expected) for name, expected in manifest["files"].items())
    return next((fault for fault in faults if fault is not None), None)


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint; None if it is missing or not as it was written."""
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _digest(manifest):
        return None
    return manifest


def _file_fault(folder: Path, name: str, expected: dict[str, Any]) -> str | None:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or path.is_symlink():
        return f"{name} lies outside the checkpoint"
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
    found = sha256_file(path)
    return (
        None if found == expected["sha256"] else f"{name} has sha256 {found[:12]}... not {expected['sha256'][:12]}..."
    )


def _digest(manifest: dict[str, Any]) -> str:
    """sha256 (hex) of a manifest: a flipped bit must not change the step or the hash of a file."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
