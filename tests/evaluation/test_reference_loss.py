import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from inheritune_ds.data.stream.validation_windows import HeldOut
from inheritune_ds.data.stream.windows import Windows
from inheritune_ds.errors import SurgeryError
from inheritune_ds.evaluation import reference_loss
from inheritune_ds.evaluation.reference_loss import write_reference_loss
from inheritune_ds.surgery.reference import ReferenceModel
from inheritune_ds.training.validation import Validator


class Constant:
    """Stands in for a scorer: every window has the same loss, but the last."""

    def __init__(self, last: float) -> None:
        self.last = last

    def window_losses(self, batches: list[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.float64]]:
        losses = [np.full(len(batch), 2.5) for batch in batches]
        losses[-1][-1] = self.last
        return losses


@pytest.mark.parametrize("last", [math.nan, math.inf])
def test_a_reference_without_a_finite_loss_is_refused_by_name(
    last: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "validation.bin"
    np.arange(4 * 128 + 1, dtype="<u2").tofile(path)
    windows = HeldOut({"embedded": Windows.of_file(path, "uint16", 128, 4 * 128 + 1)})
    validator = Validator(windows, max_tokens=4 * 128, batch_size=8, rank=0, size=1)
    reference = ReferenceModel("models/broken", tmp_path / "broken", "", {"model.safetensors": "0" * 64})
    monkeypatch.setattr(reference_loss, "load_model", lambda *_, **__: None)
    monkeypatch.setattr(reference_loss, "ReferenceScorer", lambda *_: Constant(last))
    with pytest.raises(SurgeryError) as caught:
        write_reference_loss(tmp_path / "reference.json", reference, validator, packing=None, settings={})
    assert caught.value.problem == (
        "the reference models/broken is invalid: its loss on 1 of 4 validation windows is not a finite number"
    )
    assert "allowed: weights that are finite numbers" in str(caught.value)
    assert f"do: look for NaN or infinite values in the weights in {tmp_path / 'broken'}" in str(caught.value)
    assert not (tmp_path / "reference.json").exists()
