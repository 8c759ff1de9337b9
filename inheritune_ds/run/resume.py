"""Resuming a run: the choice of the checkpoint, refusals, restoring."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inheritune_ds.checkpoints import reshard
from inheritune_ds.checkpoints.manifest import Checkpoint
from inheritune_ds.checkpoints.saver import Saver
from inheritune_ds.checkpoints.store import CheckpointStore
from inheritune_ds.checkpoints.train_state import SavedLayout, TrainState
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.errors import CheckpointError
from inheritune_ds.run.folder import RunFolder
from inheritune_ds.run.identity import check_checkpoint
from inheritune_ds.training.engine import Engine

logger = logging.getLogger(__name__)


class Resumption:
    """Chooses the checkpoint that a run resumes from, and restores it."""

    def __init__(self, folder: RunFolder, recipe: Recipe, layout: SavedLayout) -> None:
        self._folder, self._recipe, self.layout = folder, recipe, layout
        self.store = CheckpointStore.of(folder.checkpoints, recipe.checkpoint)

    def begin(self) -> None:
        """Take over the checkpoints from every earlier launch; on rank 0, which has locked the run folder.

        Raises:
            CheckpointError: If the recipe says `checkpoint.resume: never` and there are some.
        """
        newest = self.store.newest()
        if newest is not None and self._recipe.checkpoint.resume == "never":
            raise CheckpointError(
                f"{newest} exists, but the recipe says checkpoint.resume: never",
                allowed="a run folder without checkpoints",
                action="remove checkpoint.resume to resume from it, or start over with --fresh, which renames the old "
                "run folder",
            )
        self.store.claim_generation()

    def choose(self) -> dict[str, Any] | None:
        """Find the newest intact checkpoint, on rank 0.

        Returns:
            Its path and manifest, as JSON for all ranks; None if nothing has been saved.

        Raises:
            CheckpointError: If there are checkpoints and none is intact, or it cannot resume under this layout.
        """
        checkpoint = self.store.newest_intact()
        if checkpoint is None:
            return None
        reshard.check_convertible(checkpoint.layout, self.layout)
        check_checkpoint(self._folder.path, checkpoint.path, checkpoint.manifest["fingerprints"], self._recipe)
        return {"path": str(checkpoint.path), "manifest": checkpoint.manifest}

    def restore(self, engine: Engine, saver: Saver, chosen: Mapping[str, Any] | None) -> TrainState | None:
        """Restore the engine from the checkpoint of `choose`; all ranks must call it together."""
        if chosen is None:
            return None
        checkpoint = Checkpoint.of(Path(chosen["path"]), chosen["manifest"])
        state = saver.load(engine, checkpoint)
        logger.info("resumed from %s (step %d, %s tokens)", checkpoint.path, state.step, f"{state.tokens:,}")
        return state
