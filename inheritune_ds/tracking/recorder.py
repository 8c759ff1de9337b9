"""Record what the training loop reports: rank 0 writes metrics and progress, other ranks nothing."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from inheritune_ds.checkpoints.train_state import TrainState
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.console import TrainingProgress
from inheritune_ds.errors import StorageError, TrainingError
from inheritune_ds.run.folder import RunFolder
from inheritune_ds.storage.files import write_exact
from inheritune_ds.storage.jsonl import RowLog
from inheritune_ds.tracking.metrics import METRICS, METRICS_FILE, TOKENS, listed, read_metrics
from inheritune_ds.tracking.wandb import say_lost, start_wandb


class RunRecorder:
    """Metrics and progress line of rank 0."""

    def __init__(self, folder: RunFolder, recipe: Recipe, total_steps: int, state: TrainState | None) -> None:
        start = state.step if state else 0
        self._folder = folder
        self._tracker = Tracker(folder.path, recipe, resume_step=state.step if state else None)
        self._progress = TrainingProgress(total_steps, start, recipe.name)

    def log(self, step: int, tokens: int, values: dict[str, float]) -> None:
        """Record metrics at a step."""
        self._tracker.log(step, tokens, values)

    def update(self, step: int, loss: float, tokens_per_s: float) -> None:
        """Move the progress line."""
        self._progress.update(step, loss, tokens_per_s)

    def say(self, line: str) -> None:
        """Print one line, above the bar where there is one."""
        print(line, flush=True)

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


class Tracker:
    """Writes the metrics of one run; only rank 0 makes one.

    Args:
        run_dir: The run folder; it exists.
        recipe: The recipe of the run (W&B gets it as the run's config).
        resume_step: Step of the checkpoint that the run goes on from: later rows are dropped, since
            they will be written again. None starts anew and drops every row.

    Raises:
        RunFolderError: When metrics.jsonl is damaged.
        StorageError: When metrics.jsonl cannot be written.
    """

    def __init__(self, run_dir: Path, recipe: Recipe, *, resume_step: int | None) -> None:
        self._path = run_dir / METRICS_FILE
        self._rows = self._open(-1 if resume_step is None else resume_step)
        self._wandb = start_wandb(run_dir, recipe)

    def _open(self, step: int) -> RowLog:
        """Open metrics.jsonl behind the rows up to a step; later ones are dropped."""
        rows = read_metrics(self._path.parent) if step >= 0 else []
        write_exact(self._path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
        return RowLog(self._path)

    def rewind(self, step: int) -> None:
        """Drop the rows after a step, which the run does again; W&B keeps them, and takes no new ones for them.

        Raises:
            StorageError: When the file cannot be rewritten.
        """
        refusal = self._rows.close()
        if refusal is not None:
            raise self._lost(refusal)
        self._rows = self._open(step)

    def _lost(self, refusal: OSError) -> StorageError:
        return StorageError(
            f"{self._path} cannot be written: {refusal.strerror}; {self._rows.waiting} rows are missing",
            action="free some space, then give the same command again: it goes on from the newest checkpoint",
        )

    def log(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        """Append a row.

        Args:
            step: Updates done so far.
            tokens: Tokens trained on so far (the metric `train/tokens`).
            values: Metric name to value; the names stand in METRICS.

        Raises:
            ValueError: For a name that METRICS does not list.
            TrainingError: For a value that is not a finite number; nothing is written.
        """
        unknown = sorted(name for name in values if name == TOKENS or listed(name) not in METRICS)
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: not a metric that may be logged; tracking.METRICS lists them")
        row: dict[str, int | float] = {"step": step, TOKENS: tokens}
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"step {step}: {name} is {value}",
                    allowed="a finite number",
                    action="lower optimizer.lr, or look at the data of that step",
                )
            row[name] = value if isinstance(value, int) else float(value)
        refusal = self._rows.append(json.dumps(row))
        if refusal is not None and self._rows.waiting == 1:
            print(
                f"WARNING: {self._path} cannot be written: {refusal.strerror}. The run goes on; its rows are kept in "
                "memory until there is room",
                flush=True,
            )
        self._send(row)

    def close(self) -> None:
        """Finish both logs; a second call does nothing.

        Raises:
            StorageError: When rows are still missing in metrics.jsonl.
        """
        refusal = self._rows.close()
        run, self._wandb = self._wandb, None
        if run is not None:
            try:
                run.finish()
            except Exception as error:  # noqa: BLE001 (the run itself is well: W&B never stops it)
                say_lost("did not finish", error)
        if refusal is not None:
            raise self._lost(refusal)

    def _send(self, row: Mapping[str, float]) -> None:
        if self._wandb is None:
            return
        try:
            self._wandb.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])
        except Exception as error:  # noqa: BLE001 (W&B never stops a run)
            self._wandb = None
            say_lost("stopped", error)
