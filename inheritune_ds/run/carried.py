"""Optimizer state that a run takes over from a run of another depth, by parameter name."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inheritune_ds.checkpoints.manifest import Checkpoint
from inheritune_ds.checkpoints.store import CheckpointStore
from inheritune_ds.errors import CheckpointError
from inheritune_ds.run import identity
from inheritune_ds.run.folder import RunFolder
from inheritune_ds.storage.files import read_json, write_json
from inheritune_ds.surgery.load import load_config
from inheritune_ds.surgery.meta_model import MetaModel

CARRIED = "carried.json"
"""In the run folder: the checkpoint that gave the optimizer state, and the names of its parameters."""


@dataclass(frozen=True)
class CarriedState:
    """Moments and numbers of updates to start from."""

    names: Mapping[str, str]
    """From the target's name of a parameter to that in the checkpoint."""
    checkpoint: Mapping[str, Any] | None
    """Path and manifest, as JSON for all ranks; None once the run has checkpoints of its own."""

    def opened(self) -> Checkpoint | None:
        """The checkpoint to carry from."""
        if self.checkpoint is None:
            return None
        return Checkpoint.of(Path(self.checkpoint["path"]), self.checkpoint["manifest"])


def carried_state(folder: RunFolder, source: RunFolder, names: Mapping[str, str]) -> CarriedState:
    """Choose the newest intact checkpoint of a finished run, on rank 0, and record it.

    A run that has checkpoints of its own resumes from them, and needs the names only.

    Args:
        folder: Of the run that starts.
        source: Of the run that gives its state.
        names: From the target's name of a parameter to that in the source's model.

    Raises:
        CheckpointError: If the source has no intact checkpoint.
    """
    known = read_json(folder.path / CARRIED)
    if identity.has_begun(folder.path) and known is not None:
        return CarriedState(known["names"], None)
    checkpoint = CheckpointStore(source.checkpoints, keep=1).newest_intact()
    if checkpoint is None:
        raise CheckpointError(
            f"{source.checkpoints} has no checkpoint, so the optimizer state cannot be carried from it",
            allowed="a run whose last checkpoint is kept",
            action="train it again under another name, or start with a fresh optimizer state (target.inherit: all)",
        )
    chosen = {"path": str(checkpoint.path), "manifest": dict(checkpoint.manifest)}
    write_json(folder.path / CARRIED, {"checkpoint": str(checkpoint.path), "names": dict(names)})
    return CarriedState(dict(names), chosen)


def names_in_reference(target: Path, selection: list[int]) -> dict[str, str]:
    """The reference's name of every parameter of a target: block i is the reference's block `selection[i]`.

    Args:
        target: Folder of the target.
        selection: From its inheritance.json.
    """
    meta = MetaModel(load_config(target))
    found = {}
    for name, _ in meta.model.named_parameters():
        place = meta.blocks.index_of(name)
        prefix = f"{meta.blocks.path}."
        found[name] = name if place is None else f"{prefix}{selection[place]}{name.removeprefix(f'{prefix}{place}')}"
    return found
