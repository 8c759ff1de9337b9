"""Deletion of checkpoints: by the recipe's rule, or of all after a step."""

import logging
from pathlib import Path

from inheritune_ds.checkpoints.manifest import EARLIER, find_fault, published, read_manifest, step_of
from inheritune_ds.checkpoints.store import CheckpointStore, earlier_format, reading, remove_path
from inheritune_ds.errors import CheckpointError

logger = logging.getLogger(__name__)


def kept(store: CheckpointStore) -> dict[Path, str]:
    """The kept checkpoints, the newest first, and why; those that the rule at their save kept are among them."""
    reasons: dict[Path, str] = {}
    for number, checkpoint in enumerate(published(store.folder), 1):
        if number <= store.keep:
            reasons[checkpoint] = f"newest {store.keep}"
        elif store.keeps_always(step_of(checkpoint)):
            reasons[checkpoint] = f"every {store.keep_every} steps"
        elif (read_manifest(checkpoint) or {}).get("for_good"):
            reasons[checkpoint] = "by the rule at its save"
    return reasons


def expired(store: CheckpointStore) -> list[Path]:
    """Verify the newest checkpoint and find those that the rule does not keep, the newest first.

    Raises a CheckpointError if it is damaged, so nothing may be deleted, or if the folder cannot be read.
    """
    with reading(store.folder):
        found, reasons = list(published(store.folder)), kept(store)  # one that appears meanwhile is not `found`
    old = [checkpoint for checkpoint in found if checkpoint not in reasons]
    if old and (fault := find_fault(found[0])) is not None:
        if fault == EARLIER:
            raise earlier_format(found[0])
        action = "restore an intact copy of it, or remove it: until then nothing is deleted"
        raise CheckpointError(f"checkpoint {found[0]} is damaged: {fault}", action=action)
    return old


def prune(store: CheckpointStore) -> list[Path]:
    """Delete the expired checkpoints of a running run and return them; log a damaged newest one, delete nothing."""
    try:
        return [checkpoint for checkpoint in expired(store) if remove(checkpoint)]
    except CheckpointError as error:
        logger.warning("%s; all older ones are kept", error.problem)
        return []


def later_than(store: CheckpointStore, step: int) -> list[Path]:
    """The checkpoints that `go_back` would delete; raise a CheckpointError if no intact one would remain."""
    later = [checkpoint for checkpoint in published(store.folder) if step_of(checkpoint) > step]
    newest = next((checkpoint for checkpoint in published(store.folder) if checkpoint not in later), None)
    fault = "no checkpoint is that early" if newest is None else find_fault(newest)
    if newest is None or fault is not None:
        raise CheckpointError(
            f"the run cannot return to step {step}: {f'{newest.name}: ' if newest else ''}{fault}",
            allowed="a step at or after that of an intact checkpoint",
            action=f"`inheritune-ds checkpoints {store.folder.parent} verify` lists the intact ones",
        )
    return later


def go_back(store: CheckpointStore, step: int) -> list[Path]:
    """Delete and return the checkpoints later than a step, so that the run resumes from the newest of the others.

    Errors as in `later_than`, and a StorageError if the pointer cannot be written.
    """
    later = later_than(store, step)
    store.point_at(next(checkpoint for checkpoint in published(store.folder) if checkpoint not in later))
    return [checkpoint for checkpoint in later if remove(checkpoint)]


def remove(checkpoint: Path) -> bool:
    """Delete a checkpoint; log and return False if the file system refuses."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.deleted.tmp")
    try:
        remove_path(hidden)
        checkpoint.rename(hidden)  # so that a kill leaves no partial checkpoint
        remove_path(hidden, ignore_errors=False)
    except OSError as error:  # such as a shared file system on which another process still reads it
        logger.warning("checkpoint %s cannot be deleted: %s: %s", checkpoint, error.strerror, error.filename)
        return False
    return True
