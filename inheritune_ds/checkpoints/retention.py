"""Which checkpoints are kept, deleting the others, and going back to an earlier one."""

from collections.abc import Callable
from pathlib import Path

from inheritune_ds.checkpoints.manifest import find_fault, published, read_manifest, step_of
from inheritune_ds.checkpoints.store import CheckpointStore, reading, remove_path
from inheritune_ds.errors import CheckpointError


def kept(store: CheckpointStore) -> dict[Path, str]:
    """The published checkpoints that are kept, the newest first, and why; a new rule deletes none kept for good."""
    reasons: dict[Path, str] = {}
    for number, checkpoint in enumerate(published(store.folder), 1):
        if number <= store.keep:
            reasons[checkpoint] = f"newest {store.keep}"
        elif store.keeps_for_good(step_of(checkpoint)):
            reasons[checkpoint] = f"every {store.keep_every} steps"
        elif (read_manifest(checkpoint) or {}).get("for_good"):
            reasons[checkpoint] = "for good, by the rule of then"
    return reasons


def expired(store: CheckpointStore) -> list[Path]:
    """The checkpoints that the rule does not keep, the newest first, after the newest of all has been verified.

    Raises:
        CheckpointError: It is damaged, so that nothing may be deleted; or the folder cannot be read.
    """
    with reading(store.folder):
        found, staying = list(published(store.folder)), kept(store)  # one that appears meanwhile is not `found`
    old = [checkpoint for checkpoint in found if checkpoint not in staying]
    if old and (fault := find_fault(found[0])) is not None:
        action = "bring an intact copy of it back, or remove it: until then nothing is deleted"
        raise CheckpointError(f"checkpoint {found[0]} is damaged: {fault}", action=action)
    return old


def prune(store: CheckpointStore, say: Callable[[str], None]) -> list[Path]:
    """Delete the expired checkpoints while a run trains; a damaged checkpoint does not end it.

    Args:
        store: Of the run.
        say: Prints why nothing is deleted, or what cannot be.

    Returns:
        The deleted ones.
    """
    try:
        return [checkpoint for checkpoint in expired(store) if remove(checkpoint, say)]
    except CheckpointError as error:
        say(f"WARNING: {error.problem}; the older ones stay, however many there are")
        return []


def later_than(store: CheckpointStore, step: int) -> list[Path]:
    """The checkpoints that `go_back` would delete.

    Raises:
        CheckpointError: No intact one would be left.
    """
    later = [checkpoint for checkpoint in published(store.folder) if step_of(checkpoint) > step]
    newest = next((checkpoint for checkpoint in published(store.folder) if checkpoint not in later), None)
    fault = "no checkpoint is as early" if newest is None else find_fault(newest)
    if newest is None or fault is not None:
        raise CheckpointError(
            f"the run cannot go back to step {step}: {f'{newest.name}: ' if newest else ''}{fault}",
            allowed="a step at or after that of an intact checkpoint",
            action=f"`inheritune-ds checkpoints {store.folder.parent} verify` tells which are intact",
        )
    return later


def go_back(store: CheckpointStore, step: int, say: Callable[[str], None]) -> list[Path]:
    """Delete the checkpoints later than a step, so that the run resumes from the newest of the others.

    Args:
        store: Of the run.
        step: The latest that is kept.
        say: Prints what cannot be deleted.

    Returns:
        The deleted ones.

    Raises:
        CheckpointError: No intact one would be left.
        StorageError: The pointer cannot be written.
    """
    later = later_than(store, step)
    store.point_at(next(checkpoint for checkpoint in published(store.folder) if checkpoint not in later))
    return [checkpoint for checkpoint in later if remove(checkpoint, say)]


def remove(checkpoint: Path, say: Callable[[str], None]) -> bool:
    """Delete a checkpoint; False after a printed line if it cannot be deleted."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.deleted.tmp")
    try:
        remove_path(hidden)
        checkpoint.rename(hidden)  # never half deleted under its own name
        remove_path(hidden, ignore_errors=False)
    except OSError as error:  # such as a shared file system on which another process still reads it
        say(f"checkpoint {checkpoint} cannot be deleted: {error.strerror}: {error.filename}; training goes on")
        return False
    return True
