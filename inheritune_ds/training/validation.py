"""Held-out loss on fixed windows, with its standard error."""

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from inheritune_ds.checkpoints.train_state import TrainState
from inheritune_ds.data.stream.validation_windows import HeldOut
from inheritune_ds.data.window_losses import window_mean
from inheritune_ds.errors import CorpusError, StorageError, TrainingError
from inheritune_ds.storage.files import write_json
from inheritune_ds.tracking.recorder import Recorder
from inheritune_ds.training.packing import DocumentPacking, counted_targets

logger = logging.getLogger(__name__)

BATCHES_BETWEEN = 8
"""Forward passes between two checks for a request to stop."""


class WindowScorer(Protocol):
    """Computes the mean loss of windows: the engine, or a bare reference model."""

    def window_losses(self, batches: list[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.float64]]:
        """Mean loss of every window of every batch over its counted targets, in nats a token."""


@dataclass(frozen=True)
class ValidationResult:
    """Loss over the held-out windows.

    Attributes:
        loss: Mean over all counted targets, in nats.
        stderr: Standard error of that mean (see `window_mean`).
        windows: Loss of each window, in the fixed order.
        seq_len: Tokens a window.
        tokens_sha256: Hash of the windows' tokens.
        targets: Number counted in each window; empty if every token of every window is.
    """

    loss: float
    stderr: float
    windows: tuple[float, ...]
    seq_len: int
    tokens_sha256: str
    targets: tuple[int, ...] = ()

    @property
    def perplexity(self) -> float:
        """exp(loss), capped before overflow."""
        return math.exp(min(self.loss, 700.0))

    def write(self, path: Path, **extra: Any) -> None:
        """Write the result as JSON, with `extra` fields first."""
        found = asdict(self)
        if not self.targets:
            del found["targets"]
        write_json(path, {**extra, **found})


class Validator:
    """The first held-out windows, at most `max_tokens`, split over the ranks; `batch_size` windows a forward pass.

    Raises:
        CorpusError: If there are fewer than two windows: they have no standard error.
    """

    def __init__(  # noqa: PLR0913 - one argument for each thing that decides
        self,
        windows: HeldOut,
        *,
        max_tokens: int,
        batch_size: int,
        rank: int,
        size: int,
        packing: DocumentPacking | None = None,
    ) -> None:
        self.count = min(len(windows), max_tokens // windows.seq_len)
        if self.count < 2:
            raise CorpusError(
                f"the held-out part has {len(windows)} windows of {windows.seq_len} tokens, of which "
                f"validation.max_tokens = {max_tokens} allows {self.count}",
                allowed="at least 2",
                action="raise corpus.validation_ratio or validation.max_tokens, or lower training.seq_len",
            )
        self._windows, self._batch_size, self._rank, self._size = windows, batch_size, rank, size
        self._tokens_sha256 = windows.sha256(self.count)
        self._targets = self._count_targets(packing) if packing is not None else ()

    def _count_targets(self, packing: DocumentPacking) -> tuple[int, ...]:
        """Counted targets of every window, without communication between the ranks."""
        found: list[int] = []
        for start in range(0, self.count, self._batch_size):
            batch = self._windows.read(np.arange(start, min(start + self._batch_size, self.count)))
            found += counted_targets(torch.from_numpy(batch), packing).sum(dim=1).tolist()
        return tuple(found)

    @property
    def batches(self) -> int:
        """Forward passes of each rank."""
        return math.ceil(math.ceil(self.count / self._size) / self._batch_size)

    def validate(self, scorer: WindowScorer) -> ValidationResult:
        """Score the windows; all ranks must call it together."""
        result = self.validate_unless(lambda: False, scorer)
        assert result is not None
        return result

    def validate_unless(self, stop: Callable[[], bool], scorer: WindowScorer) -> ValidationResult | None:
        """Score the windows unless `stop`, which all ranks call together, returns True; then None."""
        own = np.arange(self._rank, self.count, self._size)
        # Every rank must run as many forward passes (ZeRO-3 gathers weights in each): ranks with fewer windows repeat.
        longest = math.ceil(self.count / self._size)
        padded = np.resize(own, longest) if len(own) else np.zeros(longest, dtype=np.int64)
        batches = [self._windows.read(padded[i : i + self._batch_size]) for i in range(0, longest, self._batch_size)]
        scored: list[npt.NDArray[np.float64]] = []
        for first in range(0, len(batches), BATCHES_BETWEEN):
            if stop():
                return None
            scored += scorer.window_losses(batches[first : first + BATCHES_BETWEEN])
        losses = np.concatenate(scored)[: len(own)]
        all_losses = torch.zeros(self.count, dtype=torch.float64)
        all_losses[torch.from_numpy(own)] = torch.from_numpy(losses)
        if self._size > 1:
            all_losses = all_losses.to("cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(all_losses)
        values = all_losses.cpu().numpy()
        loss, stderr = window_mean(values, self._targets)
        windows = tuple(map(float, values))
        return ValidationResult(loss, stderr, windows, self._windows.seq_len, self._tokens_sha256, self._targets)


@dataclass(frozen=True)
class ValidationTask:
    """Validates and records the result; a periodic task of the loop."""

    validator: Validator
    scorer: WindowScorer
    recorder: Recorder
    eval_dir: Path | None
    """Folder for the losses of all windows; None on ranks other than 0."""
    total_steps: int

    def run(self, state: TrainState, stop: Callable[[], bool]) -> bool:
        """Validate; False if stopped early.

        Raises:
            TrainingError: On all ranks, if the loss is not finite.
            StorageError: If the losses of the last step cannot be written.
        """
        result = self.validator.validate_unless(stop, self.scorer)
        if result is None:
            return False
        if not math.isfinite(result.loss):  # equal on all ranks, so they exit together
            raise TrainingError(
                f"step {state.step}: the validation loss is {result.loss}",
                allowed="a finite number",
                action="lower optimizer.lr or lengthen schedule.warmup_steps; look for NaN in the weights if it is "
                "step 0",
            )
        if self.eval_dir is not None:
            self._write(result, self.eval_dir, state.step)
        values = {"val/loss": result.loss, "val/stderr": result.stderr, "val/ppl": result.perplexity}
        self.recorder.log(state.step, state.tokens, values)
        logger.info("step %d: val loss %.4f +- %.4f", state.step, result.loss, result.stderr)
        return True

    def _write(self, result: ValidationResult, eval_dir: Path, step: int) -> None:
        """Write the losses of all windows; before the last step a refusal of the disk does not end the run."""
        try:
            result.write(eval_dir / f"validation-step-{step:08d}.json", step=step)
        except StorageError as error:
            if step == self.total_steps:
                raise
            logger.warning("%s; the run continues, and metrics.jsonl has the mean", error.problem)
