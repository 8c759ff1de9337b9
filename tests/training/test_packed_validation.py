"""Validation of windows with different numbers of counted targets."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from inheritune_ds.data.stream.validation_windows import HeldOut
from inheritune_ds.data.stream.windows import Windows
from inheritune_ds.data.window_losses import Pieces
from inheritune_ds.evaluation.reference_loss import ReferenceScorer
from inheritune_ds.report.results import Evaluation
from inheritune_ds.training.packing import DocumentPacking
from inheritune_ds.training.validation import ValidationResult, Validator

EOS, SEQ_LEN = 3, 4
TOKENS = [5, 6, EOS, 7, EOS, EOS, EOS, EOS, 4, 4, 4, 4, 9, 9, EOS, 8, 8]
"""Four windows of nine documents, of which four are empty; targets after an end are not counted."""
LOSSES = (2.0, 0.0, 1.0, 4.0)
"""Of every counted target of a window."""
PIECES = Pieces(
    windows=(0, 0, 1, 1, 1, 1, 2, 3, 3),
    documents=(0, 1, 2, 3, 4, 5, 5, 5, 6),
    tokens=(2, 1, 0, 0, 0, 0, 4, 2, 1),
    losses=(4.0, 2.0, 0.0, 0.0, 0.0, 0.0, 4.0, 8.0, 4.0),
)


def held_out(folder: Path) -> HeldOut:
    np.asarray(TOKENS, dtype="<u2").tofile(folder / "tokens.bin")
    return HeldOut(
        {"tokens": Windows.of_file(folder / "tokens.bin", "uint16", SEQ_LEN, len(TOKENS))}, limit=9, eos_id=EOS
    )


class Scorer:
    def window_losses(self, batches: list[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.float32]]:
        starts = {(5, 6): 0, (EOS, EOS): 1, (4, 4): 2, (9, 9): 3}
        return [
            np.array([(row[:-1] != EOS) * LOSSES[starts[int(row[0]), int(row[1])]] for row in batch], dtype=np.float32)
            for batch in batches
        ]


def validate(folder: Path, rank: int = 0, size: int = 1) -> ValidationResult:
    how = {"batch_size": 3, "rank": rank, "size": size}
    return Validator(held_out(folder), **how, packing=DocumentPacking(EOS)).validate(Scorer())


def test_loss_is_the_mean_over_counted_targets(tmp_path: Path) -> None:
    result = validate(tmp_path)
    assert result.pieces == PIECES
    assert result.loss == pytest.approx((3 * 2.0 + 4 * 1.0 + 3 * 4.0) / 10)
    result.write(tmp_path / "v.json", step=1)
    read = Evaluation(**json.loads((tmp_path / "v.json").read_text()))
    assert (read.pieces, read.loss) == (result.pieces, result.loss)


def test_ranks_count_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = validate(tmp_path)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "all_reduce", lambda losses: losses.copy_(torch.tensor(alone.pieces.losses)))
    assert [validate(tmp_path, rank, 3) for rank in range(3)] == [alone] * 3


def test_reference_is_scored_with_its_documents_apart(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "gpt2", vocab_size=11, n_embd=16, n_layer=2, n_head=2, n_positions=8, eos_token_id=None, bos_token_id=None
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    batch = held_out(tmp_path).read(np.arange(4))
    scorer = ReferenceScorer(model, DocumentPacking(EOS))
    (found,) = scorer.window_losses([batch])
    with torch.no_grad():
        pieces = [[5, 6, EOS], [7, EOS]], [[4, 4, 4, 4, 9]], [[9, 9, EOS], [8, 8]]
        for window, documents in zip((0, 2, 3), pieces, strict=True):
            losses = []
            for document in documents:
                given = torch.tensor([document])
                logits = model(input_ids=given[:, :-1].to(model.device)).logits.cpu()
                losses += torch.nn.functional.cross_entropy(logits[0], given[0, 1:], reduction="none").tolist()
            counted = batch[window, :-1] != EOS
            assert len(losses) == counted.sum()
            assert found[window][counted] == pytest.approx(losses, abs=1e-5)
    assert not found[batch[:, :-1] == EOS].any()
    assert not np.allclose(found[0], ReferenceScorer(model).window_losses([batch])[0][0], atol=1e-4)
