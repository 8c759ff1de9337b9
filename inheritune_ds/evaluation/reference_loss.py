"""The reference's loss on the validation windows of a run, which the target is compared with."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from inheritune_ds.console import Meter
from inheritune_ds.errors import SurgeryError
from inheritune_ds.storage.files import read_json
from inheritune_ds.surgery.load import load_model
from inheritune_ds.surgery.reference import ReferenceModel
from inheritune_ds.training.packing import DocumentPacking, WindowInputs, mean_losses
from inheritune_ds.training.validation import Validator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

BATCH_SIZE = 8
"""Windows of a forward pass."""


class ReferenceScorer:
    """The bare reference in fp32 on rank 0's device.

    Args:
        model: The reference.
        packing: How documents inside a window are kept apart, as for the target; None if they are not.
    """

    def __init__(self, model: "PreTrainedModel", packing: DocumentPacking | None = None) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        module: torch.nn.Module = model  # the plain type: transformers' own `to` is a wrapper
        self._model = module.to(self._device).eval()
        self._windows = WindowInputs(packing, "sdpa")  # or eager, which takes the same: the default of transformers

    def window_losses(self, batches: list[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.float64]]:
        """Mean loss of every window over its counted targets, in nats a token."""
        losses = []
        with Meter("reference validation", "batches", len(batches)) as meter:
            for batch in batches:
                tokens_BT1 = torch.from_numpy(batch)  # noqa: N806 - shape suffix
                inputs = self._windows.with_targets(tokens_BT1, self._device)
                targets = inputs.pop("targets").flatten()
                with torch.no_grad(), self._windows.apart():
                    logits_BTV = self._model(**inputs).logits  # noqa: N806
                    flat = functional.cross_entropy(logits_BTV.float().flatten(0, 1), targets, reduction="none")
                losses.append(mean_losses(flat, tokens_BT1, self._windows.packing))
                meter.advance(1)
        return losses


def write_reference_loss(
    path: Path,
    reference: ReferenceModel,
    validator: Validator,
    *,
    packing: DocumentPacking | None,
    settings: Mapping[str, Any],
) -> None:
    """Evaluate the reference, unless its result for the same files and settings is there.

    Args:
        path: The JSON file of the result.
        reference: The reference.
        validator: The windows.
        packing: How documents inside a window are kept apart.
        settings: What else decides the result, for comparing.

    Raises:
        SurgeryError: If the loss is not a finite number.
    """
    identity = {"weights": reference.weights_sha256, "settings": reference.settings_sha256, **settings}
    written = read_json(path)
    if written is not None and written["identity"] == identity:
        return
    model = load_model(reference.folder, dtype="float32")
    result = validator.validate(ReferenceScorer(model, packing))
    if not math.isfinite(result.loss):
        bad = sum(not math.isfinite(loss) for loss in result.windows)
        raise SurgeryError(
            f"the reference {reference.name} is invalid: its loss on {bad} of {len(result.windows)} "
            f"validation windows is not a finite number",
            allowed="weights that are finite numbers, on which the model computes finite losses in fp32",
            action=f"look for NaN or infinite values in the weights in {reference.folder}, or use another reference",
        )
    result.write(path, identity=identity, model=reference.name, parameters=model.num_parameters())
    logger.info("reference: val loss %.4f +- %.4f", result.loss, result.stderr)
