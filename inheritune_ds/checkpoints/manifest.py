"""What a checkpoint folder must hold, and every way in which the files may differ from it; names and pointer."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from inheritune_ds.storage.files import blake3_file

MANIFEST = "manifest.json"
POINTER = "latest"
NAME = re.compile(r"step-(\d{8})")
WORLD_WRITABLE = stat.S_IWOTH
_CHANGED_MANIFEST = f"{MANIFEST} is missing or not as it was written"
_HASHERS = 8
"""Threads at most; BLAKE3 lets go of the interpreter, so they run side by side."""


def published(folder: Path) -> Iterator[Path]:
    """Published checkpoints, the newest first.

    Args:
        folder: `checkpoints/` of a run folder; it need not exist.
    """
    if folder.is_dir():
        yield from sorted((path for path in folder.iterdir() if NAME.fullmatch(path.name)), reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name tells."""
    return int(checkpoint.name.removeprefix("step-"))


def newest_step(folder: Path) -> int:
    """Step of the newest published checkpoint; 0 if there is none."""
    newest = next(published(folder), None)
    return step_of(newest) if newest else 0


def pointer_fault(folder: Path) -> str | None:
    """Why the pointer in `checkpoints/` is of no use; None if it names a checkpoint that is there."""
    try:
        name = (folder / POINTER).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except UnicodeDecodeError:
        return "is no text"
    if not name:
        return "is empty"
    if not NAME.fullmatch(name):
        return f"holds {name[:40]!r}, which is no checkpoint's name"
    return None if (folder / name).is_dir() else f"names {name}, which is not there"


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint; None if it is missing or any byte of it differs from what was written.

    Returns:
        `step`, `generation`, `for_good` (whether retention never takes it), `files` ({path: {bytes, blake3}}) and the
        fields given to `CheckpointStore.publish`.
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
    """A manifest as it is written, with its own sha256: a flipped bit must not change the step or a file's hash."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=2, allow_nan=False) + "\n"


def find_fault(checkpoint: Path, advance: Callable[[int], None] = lambda _: None) -> str | None:
    """What is wrong with a published checkpoint; None if it is exactly what was written, and safe to load.

    Args:
        checkpoint: Its folder.
        advance: Told the bytes of every chunk that is hashed, from several threads.

    Returns:
        The first fault, with the file's path inside the folder, what was expected and what was found.
    """
    try:
        if checkpoint.is_symlink():
            return "it is a symbolic link"
        manifest = read_manifest(checkpoint)
        if manifest is None:
            return _CHANGED_MANIFEST
        if manifest.get("step") != step_of(checkpoint):
            return f"{MANIFEST} is that of step {manifest.get('step')}"
        return listing_fault(checkpoint, manifest["files"]) or _hash_fault(checkpoint, manifest["files"], advance)
    except OSError as error:
        return f"{error.filename or checkpoint} cannot be read: {error.strerror}"


def listing_fault(checkpoint: Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What can be seen without reading a file: names, links, owners, sizes, and files that nobody has listed."""
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return f"{name} lies outside the checkpoint"
    sizes: dict[str, int] = {}
    for path in [checkpoint, *sorted(checkpoint.rglob("*"))]:
        name, found = path.relative_to(checkpoint).as_posix(), path.lstat()
        if stat.S_ISLNK(found.st_mode):
            return f"{name} is a symbolic link and may lie outside the checkpoint"
        if (reason := distrust(found)) is not None:
            return f"{'its folder' if path == checkpoint else name} {reason}"
        if not stat.S_ISDIR(found.st_mode):
            sizes[name] = found.st_size if stat.S_ISREG(found.st_mode) else -1
    for name, expected in files.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != expected["bytes"]:
            return f"{name} has {sizes[name]} bytes instead of {expected['bytes']}"
    # DeepSpeed looks for shards by pattern: one of another checkpoint must not slip in.
    strange = sorted(sizes.keys() - files.keys() - {MANIFEST})
    return f"{strange[0]} is not in {MANIFEST}" if strange else None


def _hash_fault(checkpoint: Path, files: Mapping[str, Mapping[str, Any]], advance: Callable[[int], None]) -> str | None:
    def fault(name: str) -> str | None:
        expected = files[name].get("blake3")
        if expected is None:
            return f"{MANIFEST} lists no blake3 of {name}: another version of inheritune_ds has written it"
        found = blake3_file(checkpoint / name, advance)
        return None if found == expected else f"{name} has blake3 {found[:12]}... instead of {expected[:12]}..."

    pool = ThreadPoolExecutor(min(_HASHERS, os.cpu_count() or 1))
    try:
        return next((found for found in pool.map(fault, files) if found is not None), None)
    finally:
        pool.shutdown(cancel_futures=True)


def distrust(found: os.stat_result) -> str | None:
    """Why what lies there may be somebody else's work; None if only this user (and a group) can have written it."""
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}, not to you ({os.geteuid()})"
    if found.st_mode & WORLD_WRITABLE:
        return f"can be written by everybody (mode {stat.S_IMODE(found.st_mode):o})"
    return None


def close_to_others(folder: Path) -> None:
    """Take everybody's write access from a folder and all below it; links are left alone."""
    for path in [folder, *folder.rglob("*")]:
        mode = path.lstat().st_mode
        if mode & WORLD_WRITABLE and not stat.S_ISLNK(mode):
            path.chmod(stat.S_IMODE(mode) & ~WORLD_WRITABLE)
