"""The reference's loss on the validation windows of a run, which the target is compared with."""

import gc
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from inheritune_ds.config.zero import Precision
from inheritune_ds.console import Meter
from inheritune_ds.data.window_losses import RESULT_FORMAT
from inheritune_ds.errors import SurgeryError
from inheritune_ds.storage.files import read_json
from inheritune_ds.surgery.load import load_model
from inheritune_ds.surgery.reference import ReferenceModel
from inheritune_ds.training.packing import DocumentPacking, WindowInputs, losses_by_window
from inheritune_ds.training.validation import ValidationResult, Validator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

BATCH_SIZE = 8
"""Windows of a forward pass."""
_DTYPES: Mapping[Precision, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class ReferenceScorer:
    """The bare reference in the precision of the run.

    Args:
        model: The reference, on its device.
        packing: How documents inside a window are kept apart, as for the target; None if they are not.
        scored: Called after each batch with 1.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        packing: DocumentPacking | None = None,
        scored: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._model, self._scored = model.eval(), scored
        self._windows = WindowInputs(packing, "sdpa")  # or eager, which takes the same: the default of transformers

    def window_losses(self, batches: list[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.float32]]:
        """Loss (B, T) of every target of every batch, in nats; 0 for a target that is not counted."""
        losses = []
        for batch in batches:
            tokens_BT1 = torch.from_numpy(batch)  # noqa: N806 - shape suffix
            inputs = self._windows.with_targets(tokens_BT1, self._model.device)
            targets = inputs.pop("targets").flatten()
            with torch.no_grad(), self._windows.apart():
                logits_BTV = self._model(**inputs).logits  # noqa: N806
                flat = functional.cross_entropy(logits_BTV.float().flatten(0, 1), targets, reduction="none")
            losses.append(losses_by_window(flat, tokens_BT1))
            self._scored(1)
        return losses


@dataclass(frozen=True)
class ReferenceLoss:
    """Where the reference's loss is written, and what decides it.

    Attributes:
        path: The JSON file of the result.
        reference: The reference.
        precision: That of the run: the reference is computed like the target.
        settings: What else decides the result, for comparing.
    """

    path: Path
    reference: ReferenceModel
    precision: Precision
    settings: Mapping[str, Any]

    @property
    def _identity(self) -> dict[str, Any]:
        found = self.reference
        files = {"weights": found.weights_sha256, "settings": found.settings_sha256}
        return {"format": RESULT_FORMAT, **files, "precision": self.precision, **self.settings}

    def is_known(self) -> bool:
        """Whether the result for the same files and settings is there."""
        written = read_json(self.path)
        return written is not None and written["identity"] == self._identity

    def evaluate(
        self,
        validator: Validator,
        packing: DocumentPacking | None,
        device: torch.device,
        *,
        write: bool,
        stop: Callable[[], bool],
    ) -> bool:
        """Score this rank's share of the windows, and write the result on one rank; False if `stop` returned True.

        All ranks of the validator must call it together. The memory of the model is freed at the end.

        Raises:
            SurgeryError: On all ranks, if the loss is not a finite number.
        """
        model = load_model(self.reference.folder, dtype=_DTYPES[self.precision])
        parameters = model.num_parameters()
        module: torch.nn.Module = model  # the plain type: transformers' own `to` is a wrapper
        module.to(device)
        with Meter("reference validation", "batches", validator.batches) as meter:
            result = validator.validate_unless(stop, ReferenceScorer(model, packing, meter.advance))
        del model, module
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if result is None:
            return False
        self._check(result)
        if write:
            name = self.reference.name
            facts: dict[str, Any] = {"model": name, "parameters": parameters, "precision": self.precision}
            result.write(self.path, identity=self._identity, **facts)
        logger.info("reference: val loss %s (%s)", result, self.precision)
        return True

    def _check(self, result: ValidationResult) -> None:
        if math.isfinite(result.loss):
            return
        pieces = zip(result.pieces.windows, result.pieces.losses, strict=True)
        bad = len({window for window, loss in pieces if not math.isfinite(loss)})
        folder = self.reference.folder
        raise SurgeryError(
            f"the reference {self.reference.name} is invalid: its loss on {bad} of {result.windows} "
            f"validation windows is not a finite number",
            allowed=f"weights that are finite numbers, on which the model computes finite losses in {self.precision}",
            action=f"look for NaN or infinite values in the weights in {folder}, or use another reference",
        )
