"""Validation of windows with different numbers of counted targets."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from inheritune_ds.data.stream.validation_windows import HeldOut
from inheritune_ds.data.stream.windows import Windows
from inheritune_ds.data.window_losses import window_mean
from inheritune_ds.errors import RunFolderError
from inheritune_ds.evaluation.reference_loss import ReferenceScorer
from inheritune_ds.report.comparison import paired_difference
from inheritune_ds.report.results import Evaluation
from inheritune_ds.training.packing import DocumentPacking
from inheritune_ds.training.validation import ValidationResult, Validator

EOS, SEQ_LEN = 3, 4
TOKENS = [5, 6, EOS, 7, EOS, EOS, EOS, EOS, 4, 4, 4, 4, 9, 9, EOS, 8, 8]
"""Four windows; targets after an end are not counted."""
COUNTED, LOSSES = (3, 0, 4, 3), (2.0, 0.0, 1.0, 4.0)


def held_out(folder: Path) -> HeldOut:
    np.asarray(TOKENS, dtype="<u2").tofile(folder / "tokens.bin")
    return HeldOut({"tokens": Windows.of_file(folder / "tokens.bin", "uint16", SEQ_LEN, len(TOKENS))})


class Scorer:
    def window_losses(self, batches: list[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.float64]]:
        starts = {(5, 6): 0, (EOS, EOS): 1, (4, 4): 2, (9, 9): 3}
        return [np.array([LOSSES[starts[int(row[0]), int(row[1])]] for row in batch]) for batch in batches]


def validate(folder: Path, rank: int = 0, size: int = 1) -> ValidationResult:
    how = {"max_tokens": 100, "batch_size": 3, "rank": rank, "size": size}
    return Validator(held_out(folder), **how, packing=DocumentPacking(EOS)).validate(Scorer())


def test_loss_is_the_mean_over_counted_targets(tmp_path: Path) -> None:
    result = validate(tmp_path)
    assert result.targets == COUNTED
    assert result.windows == LOSSES
    assert result.loss == pytest.approx((3 * 2.0 + 4 * 1.0 + 3 * 4.0) / 10)
    result.write(tmp_path / "v.json", step=1)
    read = Evaluation(**json.loads((tmp_path / "v.json").read_text()))
    assert (read.targets, read.loss) == (COUNTED, result.loss)


def test_ranks_count_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = validate(tmp_path)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "all_reduce", lambda losses: losses.copy_(torch.tensor(alone.windows)))
    assert [validate(tmp_path, rank, 3) for rank in range(3)] == [alone] * 3


def test_windows_of_equal_counts_have_the_plain_mean_and_standard_error() -> None:
    values = [1.0, 2.5, 3.0, 7.0]
    plain = statistics.fmean(values), statistics.stdev(values) / 2.0
    assert window_mean(values) == pytest.approx(plain)
    assert window_mean(values, (5,) * 4) == pytest.approx(plain)
    assert window_mean(values, (10**6, 10**6, 10**6, 10**6 + 1)) == pytest.approx(plain, rel=1e-5)
    assert window_mean([0.0, 0.0], (0, 0)) == (0.0, 0.0)


def test_standard_error_of_unequal_windows_matches_many_draws() -> None:
    draw = np.random.default_rng(0)

    def sample() -> tuple[list[float], list[int]]:
        counts = draw.integers(20, 200, 60)
        return list(5.0 - counts / 100.0 + draw.normal(0.0, 1.0, 60)), counts.tolist()

    found = [window_mean(*sample()) for _ in range(2000)]
    means, errors = zip(*found, strict=True)
    assert statistics.fmean(errors) == pytest.approx(statistics.stdev(means), rel=0.05)
    plain = [statistics.fmean(sample()[0]) for _ in range(200)]
    assert abs(statistics.fmean(means) - statistics.fmean(plain)) > 0.1, "windows of many targets weigh more"


def test_difference_of_two_models_weighs_the_windows_alike() -> None:
    text: dict[str, Any] = {"seq_len": 4, "tokens_sha256": "a" * 64, "stderr": 0.1}
    a = Evaluation(loss=2.2, windows=(2.0, 0.0, 1.0, 4.0), targets=COUNTED, **text)
    b = Evaluation(loss=1.9, windows=(1.5, 0.0, 1.0, 3.5), targets=COUNTED, **text)
    assert paired_difference("a", a, "b", b).mean == pytest.approx(2.2 - 1.9)
    plain = Evaluation(loss=1.6, windows=b.windows, **text)
    with pytest.raises(RunFolderError) as caught:
        paired_difference("a", a, "b", plain)
    problem = "a was validated on 10 targets, documents kept apart and b on every target: they cannot be compared"
    assert caught.value.problem == problem
    assert "training.packing" in caught.value.allowed


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
            assert len(losses) == COUNTED[window]
            assert found[window] == pytest.approx(statistics.fmean(losses), abs=1e-5)
    assert found[1] == 0.0
    assert not math.isclose(found[0], ReferenceScorer(model).window_losses([batch])[0][0], abs_tol=1e-4)
