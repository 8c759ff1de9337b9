"""Loss on the validation windows by window and document, with its standard error."""

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from inheritune_ds.checkpoints.train_state import TrainState
from inheritune_ds.data.stream.validation_windows import HeldOut
from inheritune_ds.data.window_losses import RESULT_FORMAT, Pieces
from inheritune_ds.errors import CorpusError, StorageError, TrainingError
from inheritune_ds.plan.checks import MIN_VALIDATION_WINDOWS
from inheritune_ds.storage.files import write_json
from inheritune_ds.tracking.recorder import Recorder
from inheritune_ds.training.packing import DocumentPacking, counted_targets

logger = logging.getLogger(__name__)

BATCHES_BETWEEN = 8
"""Forward passes between two checks for a request to stop."""


class WindowScorer(Protocol):
    """Computes the losses of windows: the engine, or a bare reference model."""

    def window_losses(self, batches: list[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.float32]]:
        """Loss (B, T) of every target of every batch, in nats; 0 for a target that is not counted."""


@dataclass(frozen=True)
class ValidationResult:
    """Loss over the validation windows.

    Attributes:
        loss: Mean over all counted targets, in nats.
        stderr: Its standard error over documents; None if they are too few (see `estimate`).
        windows: Number of windows.
        seq_len: Tokens a window.
        tokens_sha256: Hash of the windows' tokens.
        pieces: Loss by window and document.
    """

    loss: float
    stderr: float | None
    windows: int
    seq_len: int
    tokens_sha256: str
    pieces: Pieces

    @property
    def perplexity(self) -> float:
        """exp(loss), capped before overflow."""
        return math.exp(min(self.loss, 700.0))

    def __str__(self) -> str:
        return f"{self.loss:.4f}" if self.stderr is None else f"{self.loss:.4f} +- {self.stderr:.4f}"

    def write(self, path: Path, **extra: Any) -> None:
        """Write the result as JSON, with its format and `extra` fields first."""
        write_json(path, {"format": RESULT_FORMAT, **extra, **asdict(self)})


class Validator:
    """The validation windows, split over the ranks; `batch_size` windows a forward pass.

    Raises:
        CorpusError: If there are fewer than two windows.
    """

    def __init__(
        self, windows: HeldOut, *, batch_size: int, rank: int, size: int, packing: DocumentPacking | None = None
    ) -> None:
        self.count = len(windows)
        if self.count < MIN_VALIDATION_WINDOWS:
            raise CorpusError(
                f"the held-out part has {windows.available} windows of {windows.seq_len} tokens, of which "
                f"validation.max_tokens allows {self.count}",
                allowed=f"at least {MIN_VALIDATION_WINDOWS}",
                action="raise corpus.validation_ratio or validation.max_tokens, or lower training.seq_len",
            )
        self._windows, self._batch_size, self._rank, self._size = windows, batch_size, rank, size
        self._tokens_sha256 = windows.sha256()
        self._find_pieces(packing)

    def _find_pieces(self, packing: DocumentPacking | None) -> None:
        """Place and counted targets of every piece, without communication between the ranks."""
        offsets: list[npt.NDArray[np.int64]] = []
        documents: list[npt.NDArray[np.int64]] = []
        tokens: list[npt.NDArray[np.int64]] = []
        for first in range(0, self.count, self._batch_size):
            numbers = np.arange(first, min(first + self._batch_size, self.count))
            counted = counted_targets(torch.from_numpy(self._windows.read(numbers)), packing).numpy()
            for row, counts in zip(self._windows.documents(numbers), counted, strict=True):
                offsets.append(np.flatnonzero(np.diff(row, prepend=-1)))
                documents.append(row[offsets[-1]])
                tokens.append(np.add.reduceat(counts.astype(np.int64), offsets[-1]))
        self._offsets = offsets
        """Of every window: the first targets of its pieces."""
        self._ends = np.cumsum([len(starts) for starts in offsets])
        numbers_of_documents = np.unique(np.concatenate(documents), return_inverse=True)[1]
        self._pieces = Pieces(
            windows=tuple(np.repeat(np.arange(self.count), [len(starts) for starts in offsets]).tolist()),
            documents=tuple(numbers_of_documents.tolist()),
            tokens=tuple(np.concatenate(tokens).tolist()),
            losses=(),
        )

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
        scored: list[npt.NDArray[np.float32]] = []
        for first in range(0, len(batches), BATCHES_BETWEEN):
            if stop():
                return None
            scored += scorer.window_losses(batches[first : first + BATCHES_BETWEEN])
        return self._result(self._sum_pieces(own, np.concatenate(scored)[: len(own)]))

    def _sum_pieces(self, own: npt.NDArray[np.int64], losses: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Loss (K,) of every piece, from the losses (windows, T) of this rank's windows."""
        sums = torch.zeros(len(self._pieces.windows), dtype=torch.float64)
        for number, row in zip(own.tolist(), losses, strict=True):
            offsets, end = self._offsets[number], self._ends[number]
            sums[end - len(offsets) : end] = torch.from_numpy(np.add.reduceat(row.astype(np.float64), offsets))
        if self._size > 1:
            sums = sums.to("cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(sums)
        return sums.cpu().numpy()

    def _result(self, losses: npt.NDArray[np.float64]) -> ValidationResult:
        pieces = replace(self._pieces, losses=tuple(losses.tolist()))
        with np.errstate(invalid="ignore"):  # the caller reports losses that are not finite
            found = pieces.estimate()
        seq_len = self._windows.seq_len
        return ValidationResult(found.mean, found.stderr, self.count, seq_len, self._tokens_sha256, pieces)


@dataclass(frozen=True)
class ValidationTask:
    """Validates and records the result; a periodic task of the loop."""

    validator: Validator
    scorer: WindowScorer
    recorder: Recorder
    eval_dir: Path | None
    """Folder for the results; None on ranks other than 0."""
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
        values = {"val/loss": result.loss, "val/ppl": result.perplexity}
        if result.stderr is not None:
            values["val/stderr"] = result.stderr
        self.recorder.log(state.step, state.tokens, values)
        logger.info("step %d: val loss %s", state.step, result)
        return True

    def _write(self, result: ValidationResult, eval_dir: Path, step: int) -> None:
        """Write the result; before the last step a refusal of the disk does not end the run."""
        try:
            result.write(eval_dir / f"validation-step-{step:08d}.json", step=step)
        except StorageError as error:
            if step == self.total_steps:
                raise
            logger.warning("%s; the run continues, and metrics.jsonl has the mean", error.problem)
