"""Who hears what the training loop reports: rank 0 everything, the other ranks nothing."""

from contextlib import suppress

from inheritune_ds.errors import StorageError
from inheritune_ds.recipe import Recipe
from inheritune_ds.run_folder import RunFolder
from inheritune_ds.tracking import Progress, Tracker
from inheritune_ds.training.run_state import RunState


class RunRecorder:
    """Metrics and progress line of rank 0."""

    def __init__(self, folder: RunFolder, recipe: Recipe, total_steps: int, state: RunState | None) -> None:
        start = state.step if state else 0
        self._folder = folder
        self._tracker = Tracker(folder.path, recipe, resume_step=state.step if state else None)
        self._progress = Progress(total_steps, start, recipe.name)

    def log(self, step: int, tokens: int, values: dict[str, float]) -> None:
        """Record metrics at a step."""
        self._tracker.log(step, tokens, values)

    def update(self, step: int, loss: float, tokens_per_s: float) -> None:
        """Move the progress line."""
        self._progress.update(step, loss, tokens_per_s)

    def say(self, line: str) -> None:
        """Print one line."""
        self._progress.say(line)

    def saved(self, step: int) -> None:
        """Note that the run can go on from a step; a disk that refuses it ends nothing."""
        with suppress(StorageError):
            self._folder.write_status("running", step=step)

    def rewind(self, step: int) -> None:
        """Forget what was recorded after a step."""
        self._tracker.rewind(step)

    def close(self) -> None:
        """Finish the line and the logs."""
        self._progress.close()
        self._tracker.close()


class SilentRecorder:
    """What the other ranks record: nothing."""

    def log(self, step: int, tokens: int, values: dict[str, float]) -> None:
        """Rank 0 logs."""

    def update(self, step: int, loss: float, tokens_per_s: float) -> None:
        """Rank 0 shows."""

    def say(self, line: str) -> None:
        """Rank 0 speaks."""

    def saved(self, step: int) -> None:
        """Rank 0 writes."""

    def rewind(self, step: int) -> None:
        """Rank 0 forgets."""

    def close(self) -> None:
        """Nothing is open."""
