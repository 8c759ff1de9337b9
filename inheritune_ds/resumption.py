"""How a run goes on: from which checkpoint, and what is refused before anything is prepared."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from inheritune_ds.checkpoint_store import CheckpointStore, read_manifest
from inheritune_ds.errors import CheckpointError
from inheritune_ds.files import read_json
from inheritune_ds.recipe import Recipe
from inheritune_ds.run_data import RECORD as DATA_RECORD
from inheritune_ds.run_folder import RunFolder
from inheritune_ds.training import elastic
from inheritune_ds.training.checkpoints import Checkpoints
from inheritune_ds.training.engine import Engine
from inheritune_ds.training.run_state import Layout, RunState


class Resumption:
    """The way back of one run.

    Args:
        folder: The run folder.
        recipe: Its recipe.
        layout: Of this launch.
        say: Prints one line for the user.
    """

    def __init__(self, folder: RunFolder, recipe: Recipe, layout: Layout, say: Callable[[str], None]) -> None:
        self._recipe, self._layout, self._say = recipe, layout, say
        self._record = folder.path / DATA_RECORD
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

    def choose(self) -> str | None:
        """Find the newest verified checkpoint, on rank 0; None if nothing was ever saved.

        Raises:
            CheckpointError: If there are checkpoints and none is intact, or it cannot go on under this layout.
        """
        checkpoint = self.store.newest_verified(self._say)
        if checkpoint is None:
            return None
        manifest = read_manifest(checkpoint) or {}
        elastic.check_convertible(Layout(**manifest["layout"]), self._layout)
        self._refuse_other_data(checkpoint, manifest["fingerprints"])
        return str(checkpoint)

    def _refuse_other_data(self, checkpoint: Path, saved: Mapping[str, Any]) -> None:
        """Refuse a checkpoint that was brought here from a run on other data: with the same shapes it would load."""
        here = (read_json(self._record) or {}).get("fingerprint")
        if here is not None and saved["data"] is not None and here != saved["data"]:
            raise CheckpointError(
                f"{checkpoint} was made from other data than this run: fingerprint {saved['data'][:12]}... there, "
                f"{here[:12]}... in {self._record}",
                allowed="checkpoints of this run",
                action="take it away again, and give the same command",
            )

    def restore(self, engine: Engine, checkpoints: Checkpoints, chosen: str | None) -> RunState | None:
        """Bring the engine to the chosen checkpoint; all ranks must call it together."""
        if chosen is None:
            return None
        state = checkpoints.load(engine, Path(chosen))
        self._say(f"resumed from {chosen} (step {state.step}, {state.tokens:,} tokens)")
        return state
