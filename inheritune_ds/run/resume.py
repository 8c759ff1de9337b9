"""How a run resumes: from which checkpoint, and what is refused before anything is prepared."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from inheritune_ds.checkpoints import reshard
from inheritune_ds.checkpoints.manifest import Checkpoint
from inheritune_ds.checkpoints.saver import Saver
from inheritune_ds.checkpoints.store import CheckpointStore
from inheritune_ds.checkpoints.train_state import SavedLayout, TrainState
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.errors import CheckpointError
from inheritune_ds.run.data import RECORD as DATA_RECORD
from inheritune_ds.run.folder import RESOLVED_RECIPE, RunFolder, with_revisions
from inheritune_ds.storage.files import read_json
from inheritune_ds.training.engine import Engine


class Resumption:
    """Chooses the checkpoint that one run resumes from, and restores it.

    Args:
        folder: The run folder.
        recipe: Its recipe.
        layout: Of this launch.
        say: Prints one line for the user.
    """

    def __init__(self, folder: RunFolder, recipe: Recipe, layout: SavedLayout, say: Callable[[str], None]) -> None:
        self._folder, self._recipe, self._layout, self._say = folder, recipe, layout, say
        self.store = CheckpointStore.of(folder.checkpoints, recipe.checkpoint)

    def begin(self) -> None:
        """Take the checkpoints over from every earlier launch; on rank 0, which has the run folder.

        Raises:
            CheckpointError: If the recipe says `checkpoint.resume: never` and there are some; as the store's methods.
        """
        newest = self.store.newest()
        if newest is not None and self._recipe.checkpoint.resume == "never":
            raise CheckpointError(
                f"{newest} is there, and the recipe says checkpoint.resume: never",
                allowed="a run folder without checkpoints",
                action="leave out checkpoint.resume to go on from it, or start over with --fresh, which sets the old "
                "run aside",
            )
        self.store.claim_generation()

    def choose(self) -> dict[str, Any] | None:
        """Find the newest intact checkpoint, on rank 0.

        Returns:
            Its path and manifest, as JSON for all ranks; None if nothing was ever saved.

        Raises:
            CheckpointError: If there are checkpoints and none is intact, or it cannot resume under this layout.
        """
        checkpoint = self.store.newest_intact(self._say)
        if checkpoint is None:
            return None
        reshard.check_convertible(checkpoint.layout, self._layout)
        self._refuse_other_run(checkpoint.path, checkpoint.manifest["fingerprints"])
        return {"path": str(checkpoint.path), "manifest": checkpoint.manifest}

    def _refuse_other_run(self, checkpoint: Path, saved: Mapping[str, Any]) -> None:
        """Refuse a checkpoint that was brought here from another run: with the same shapes it would load."""
        recipes = (self._recipe.fingerprint, with_revisions(self._recipe, self._folder.pin_of).fingerprint)
        if saved["recipe"] not in recipes:
            raise _of_another_run(checkpoint, "by another recipe", saved["recipe"], recipes[1], RESOLVED_RECIPE)
        data = (read_json(self._folder.path / DATA_RECORD) or {}).get("fingerprint")
        if data is not None and saved["data"] not in (None, data):
            raise _of_another_run(checkpoint, "from other data", saved["data"], data, DATA_RECORD)

    def restore(self, engine: Engine, saver: Saver, chosen: Mapping[str, Any] | None) -> TrainState | None:
        """Bring the engine to the checkpoint of `choose`; all ranks must call it together."""
        if chosen is None:
            return None
        checkpoint = Checkpoint.of(Path(chosen["path"]), chosen["manifest"])
        state = saver.load(engine, checkpoint)
        self._say(f"resumed from {checkpoint.path} (step {state.step}, {state.tokens:,} tokens)")
        return state


def _of_another_run(checkpoint: Path, how: str, there: str, here: str, record: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint} was made {how} than this run: fingerprint {there[:12]}... there, {here[:12]}... in {record}",
        allowed="checkpoints of this run",
        action="take it away again, and give the same command",
    )
