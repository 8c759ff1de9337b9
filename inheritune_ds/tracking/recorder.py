"""Record the training: rank 0 writes metrics, progress and status, other ranks nothing."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from inheritune_ds.checkpoints.train_state import TrainState
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.console import TrainingProgress
from inheritune_ds.errors import StorageError
from inheritune_ds.tracking.metrics import MetricFile, make_row
from inheritune_ds.tracking.wandb import WandbCopy


class Recorder:
    """Records the training. This one, for ranks other than 0, does nothing."""

    def log(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        """Record metrics at a step."""

    def update(self, step: int, loss: float, tokens_per_s: float) -> None:
        """Move the progress line."""

    def saved(self, step: int) -> None:
        """Note that the run can resume from a step."""

    def rewind(self, step: int) -> None:
        """Drop the records after a step, which the run repeats."""

    def close(self) -> None:
        """Finish the progress line and the logs; a second call does nothing."""


class RunRecorder(Recorder):
    """The recorder of rank 0: metrics.jsonl, its copy on W&B, the progress line, the status.

    It drops the rows after `state`, or all without one. `on_saved` is called with the step of each published
    checkpoint; its StorageError does not end the run.

    Raises:
        RunFolderError: When metrics.jsonl is damaged.
        StorageError: When metrics.jsonl cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        recipe: Recipe,
        total_steps: int,
        state: TrainState | None,
        *,
        on_saved: Callable[[int], None],
    ) -> None:
        self._file = MetricFile(run_dir, state.step if state else None)
        self._wandb = WandbCopy(run_dir, recipe)
        self._progress = TrainingProgress(total_steps, state.step if state else 0, recipe.name)
        self._on_saved = on_saved

    def log(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        """Record metrics at a step."""
        row = make_row(step, tokens, values)
        self._file.append(row)
        self._wandb.log(row)

    def update(self, step: int, loss: float, tokens_per_s: float) -> None:
        """Move the progress line."""
        self._progress.update(step, loss, tokens_per_s)

    def saved(self, step: int) -> None:
        """Note that the run can resume from a step."""
        with suppress(StorageError):
            self._on_saved(step)

    def rewind(self, step: int) -> None:
        """Drop the rows after a step (see MetricFile); W&B keeps them, and ignores the repeated ones."""
        self._file.rewind(step)

    def close(self) -> None:
        """Finish the progress line and both logs (see MetricFile)."""
        self._progress.close()
        try:
            self._file.close()
        finally:
            self._wandb.close()
