"""The manifest of a checkpoint, verification of its files, names and pointer."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from inheritune_ds.checkpoints.train_state import SavedLayout, TrainState
from inheritune_ds.storage.files import blake3_file

MANIFEST = "manifest.json"
POINTER = "latest"
FORMAT = 2
"""Manifests without a number are of format 1, with DeepSpeed's own files."""
EARLIER = "it is of the format before this one; commit 318409b is the last that reads it"
NAME = re.compile(r"step-(\d{8})")
_CHANGED_MANIFEST = f"{MANIFEST} is missing or not as it was written"
_MAX_HASHERS = 8
"""Threads, which run in parallel since BLAKE3 releases the interpreter lock."""


@dataclass(frozen=True)
class Checkpoint:
    """The folder of a checkpoint and its manifest, which is parsed once."""

    path: Path
    manifest: Mapping[str, Any]
    state: TrainState
    layout: SavedLayout

    @classmethod
    def of(cls, path: Path, manifest: Mapping[str, Any]) -> "Checkpoint":
        """The checkpoint of a manifest of this format."""
        return cls(path, manifest, TrainState.of(manifest["state"]), SavedLayout(**manifest["layout"]))


def published(folder: Path) -> Iterator[Path]:
    """Published checkpoints of a run's `checkpoints/`, which need not exist; the newest first."""
    if folder.is_dir():
        yield from sorted((path for path in folder.iterdir() if NAME.fullmatch(path.name)), reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def newest_step(folder: Path) -> int:
    """Step of the newest published checkpoint; 0 if there is none."""
    newest = next(published(folder), None)
    return step_of(newest) if newest else 0


def pointer_fault(folder: Path) -> str | None:
    """Why the pointer in `checkpoints/` is invalid; None if it names an existing checkpoint."""
    try:
        name = (folder / POINTER).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except UnicodeDecodeError:
        return "is not text"
    if not name:
        return "is empty"
    if not NAME.fullmatch(name):
        return f"holds {name[:40]!r}, which is not the name of a checkpoint"
    return None if (folder / name).is_dir() else f"names {name}, which is not there"


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint; None if it is missing or any byte of it has changed.

    It has `format`, `step`, `generation`, `for_good` (retention never deletes it), `files` ({path: {bytes, blake3}}),
    `state`, `layout`, `fingerprints`, and `parameters` and `engine` of a snapshot.
    """
    path = checkpoint / MANIFEST
    try:
        if path.is_symlink():
            return None
        text = path.read_bytes().decode("utf-8")
        manifest = json.loads(text)
        if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
            return None
        manifest.pop("sha256", None)
        # The text is compared, not the hash alone: a digit of a float may change without changing its value.
        return manifest if manifest_text(manifest) == text else None
    except (OSError, ValueError):
        return None


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """Serialize a manifest with its own sha256, which reveals a flipped bit in a step or hash."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=2, allow_nan=False) + "\n"


def examine(checkpoint: Path, advance: Callable[[int], None] = lambda _: None) -> Checkpoint | str:
    """Return a published checkpoint if no byte of it has changed and it is safe to load; otherwise its first fault.

    `advance` is called with the bytes of every hashed chunk, from several threads.
    """
    try:
        if checkpoint.is_symlink():
            return "it is a symbolic link"
        manifest = read_manifest(checkpoint)
        if manifest is None:
            return _CHANGED_MANIFEST
        if manifest.get("step") != step_of(checkpoint):
            return f"{MANIFEST} is that of step {manifest.get('step')}"
        if manifest.get("format") != FORMAT:
            return EARLIER
        files = manifest["files"]
        fault = listing_fault(checkpoint, files) or _hash_fault(checkpoint, files, advance)
        return fault or Checkpoint.of(checkpoint, manifest)
    except OSError as error:
        return f"{error.filename or checkpoint} cannot be read: {error.strerror}"


def find_fault(checkpoint: Path, advance: Callable[[int], None] = lambda _: None) -> str | None:
    """The first fault of a checkpoint; None if there is none."""
    found = examine(checkpoint, advance)
    return found if isinstance(found, str) else None


def listing_fault(checkpoint: Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Find a fault without reading a file: names, links, owners, sizes, and files that are not listed."""
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return f"{name} is outside the checkpoint"
    sizes: dict[str, int] = {}
    for path in [checkpoint, *sorted(checkpoint.rglob("*"))]:
        name, found = path.relative_to(checkpoint).as_posix(), path.lstat()
        if stat.S_ISLNK(found.st_mode):
            return f"{name} is a symbolic link and may point outside the checkpoint"
        if (reason := distrust(found)) is not None:
            return f"{'its folder' if path == checkpoint else name} {reason}"
        if not stat.S_ISDIR(found.st_mode):
            sizes[name] = found.st_size if stat.S_ISREG(found.st_mode) else -1
    for name, expected in files.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != expected["bytes"]:
            return f"{name} has {sizes[name]} bytes instead of {expected['bytes']}"
    strange = sorted(sizes.keys() - files.keys() - {MANIFEST})
    return f"{strange[0]} is not in {MANIFEST}" if strange else None


def _hash_fault(checkpoint: Path, files: Mapping[str, Mapping[str, Any]], advance: Callable[[int], None]) -> str | None:
    def fault(name: str) -> str | None:
        expected, found = files[name]["blake3"], blake3_file(checkpoint / name, advance)
        return None if found == expected else f"{name} has blake3 {found[:12]}... instead of {expected[:12]}..."

    pool = ThreadPoolExecutor(min(_MAX_HASHERS, os.cpu_count() or 1))
    try:
        return next((found for found in pool.map(fault, files) if found is not None), None)
    finally:
        pool.shutdown(cancel_futures=True)


def distrust(found: os.stat_result) -> str | None:
    """Why another user may have written a file; None if only this user and a group can have."""
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}, not to you ({os.geteuid()})"
    if found.st_mode & stat.S_IWOTH:
        return f"can be written by any user (mode {stat.S_IMODE(found.st_mode):o})"
    return None


def close_to_others(folder: Path) -> None:
    """Remove other users' write access from a folder and everything below it; links are not followed."""
    for path in [folder, *folder.rglob("*")]:
        mode = path.lstat().st_mode
        if mode & stat.S_IWOTH and not stat.S_ISLNK(mode):
            path.chmod(stat.S_IMODE(mode) & ~stat.S_IWOTH)
