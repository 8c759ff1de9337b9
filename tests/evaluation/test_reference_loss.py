import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inheritune_ds.config.zero import Precision
from inheritune_ds.data.stream.validation_windows import HeldOut
from inheritune_ds.data.stream.windows import Windows
from inheritune_ds.errors import SurgeryError
from inheritune_ds.evaluation import reference_loss
from inheritune_ds.evaluation.reference_loss import ReferenceLoss
from inheritune_ds.surgery.reference import ReferenceModel
from inheritune_ds.training.validation import Validator
from tests import tiny

CPU = torch.device("cpu")


def validator(folder: Path) -> Validator:
    path = folder / "validation.bin"
    (np.arange(8 * 32 + 1) % tiny.LLAMA["vocab_size"]).astype("<u2").tofile(path)
    windows = HeldOut({"embedded": Windows.of_file(path, "uint16", 32, 8 * 32 + 1)}, limit=8, eos_id=0)
    return Validator(windows, batch_size=3, rank=0, size=1)


def scoring(folder: Path, precision: Precision, **settings: object) -> ReferenceLoss:
    reference = ReferenceModel("models/small", folder / "small", "", {"model.safetensors": "0" * 64})
    return ReferenceLoss(folder / "reference.json", reference, precision, settings)


def never() -> bool:
    return False


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_reference_is_computed_in_the_precision_of_the_run(
    precision: Precision, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.model(tiny.recipe()).save_pretrained(tmp_path / "small")
    used: list[torch.dtype] = []

    class Spy(reference_loss.ReferenceScorer):
        def window_losses(self, batches: list[Any]) -> list[Any]:
            used.append(self._model.dtype)
            return super().window_losses(batches)

    monkeypatch.setattr(reference_loss, "ReferenceScorer", Spy)
    found = scoring(tmp_path, precision)
    assert not found.is_known()
    assert found.evaluate(validator(tmp_path), None, CPU, write=True, stop=never)
    assert used == [dtype]
    written = json.loads(found.path.read_text())
    assert (written["precision"], written["model"], written["windows"]) == (precision, "models/small", 8)
    assert found.is_known()
    assert not scoring(tmp_path, "fp16").is_known()
    assert not scoring(tmp_path, precision, seq_len=7).is_known()


def test_a_reference_is_not_written_after_a_stop_or_on_other_ranks(tmp_path: Path) -> None:
    tiny.model(tiny.recipe()).save_pretrained(tmp_path / "small")
    found = scoring(tmp_path, "fp32")
    assert not found.evaluate(validator(tmp_path), None, CPU, write=True, stop=lambda: True)
    assert found.evaluate(validator(tmp_path), None, CPU, write=False, stop=never)
    assert not found.path.exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reference_without_a_finite_loss_is_refused_by_name(value: float, tmp_path: Path) -> None:
    model = tiny.model(tiny.recipe())
    with torch.no_grad():
        model.lm_head.weight[3, 0] = value
    model.save_pretrained(tmp_path / "small")
    found = scoring(tmp_path, "fp32")
    with pytest.raises(SurgeryError) as caught:
        found.evaluate(validator(tmp_path), None, CPU, write=True, stop=never)
    assert caught.value.problem == (
        "the reference models/small is invalid: its loss on 8 of 8 validation windows is not a finite number"
    )
    assert "allowed: weights that are finite numbers, on which the model computes finite losses in fp32" in str(
        caught.value
    )
    assert f"do: look for NaN or infinite values in the weights in {tmp_path / 'small'}" in str(caught.value)
    assert not found.path.exists()
