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

from inheritune_ds.data.stream.validation_windows import HeldOut
from inheritune_ds.data.stream.windows import Windows
from inheritune_ds.data.window_losses import Pieces
from inheritune_ds.errors import CorpusError
from inheritune_ds.training.validation import ValidationResult, Validator

SEQ_LEN, EOS = 4, 60_000
Losses = list[npt.NDArray[np.float32]]


def windows(folder: Path, count: int, limit: int = 1000) -> HeldOut:
    """Every window is a document."""
    tokens = np.arange(count * SEQ_LEN + 1, dtype="<u2")
    tokens[::SEQ_LEN] = EOS
    tokens[1::SEQ_LEN] = np.arange(count)
    (folder / "validation.bin").write_bytes(tokens.tobytes())
    return HeldOut(
        {"tokens": Windows.of_file(folder / "validation.bin", "uint16", SEQ_LEN, len(tokens))}, limit=limit, eos_id=EOS
    )


class Scorer:
    """A window's loss is a fixed irregular number, so a mixed-up order would show."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    @staticmethod
    def loss_of(window: int) -> float:
        return 1.0 + math.sin(1.7 * window) + 0.01 * window

    def window_losses(self, batches: list[npt.NDArray[np.int64]]) -> Losses:
        self.shapes += [batch.shape for batch in batches]
        losses = [[[self.loss_of(int(row[1]))] * SEQ_LEN for row in batch] for batch in batches]
        return [np.array(batch, dtype=np.float32) for batch in losses]


def losses_of(result: ValidationResult) -> list[float]:
    """Mean loss of every window, each of which is one piece."""
    assert result.pieces.windows == tuple(range(result.windows))
    return [loss / SEQ_LEN for loss in result.pieces.losses]


@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
def test_validate_gives_mean_and_standard_error(batch_size: int, tmp_path: Path) -> None:
    validator = Validator(windows(tmp_path, 10), batch_size=batch_size, rank=0, size=1)
    scorer = Scorer()
    result = validator.validate(scorer)
    expected = [Scorer.loss_of(window) for window in range(10)]
    assert losses_of(result) == pytest.approx(expected, rel=1e-6)
    assert result.loss == pytest.approx(statistics.fmean(expected), rel=1e-6)
    assert result.stderr == pytest.approx(statistics.stdev(expected) / math.sqrt(10), rel=1e-6)
    assert sum(shape[0] for shape in scorer.shapes) == 10
    assert all(shape[0] <= batch_size and shape[1] == SEQ_LEN + 1 for shape in scorer.shapes)


def test_validate_scores_the_windows_and_hashes_them(tmp_path: Path) -> None:
    held = windows(tmp_path, 12, limit=4)
    validator = Validator(held, batch_size=3, rank=0, size=1)
    result = validator.validate(Scorer())
    assert validator.count == result.windows == 4
    assert losses_of(result) == pytest.approx([Scorer.loss_of(window) for window in (1, 4, 7, 10)], rel=1e-6)
    assert validator.validate(Scorer()) == result, "a repeat is the same"
    assert (result.seq_len, result.tokens_sha256) == (SEQ_LEN, held.sha256())


@pytest.mark.parametrize(("count", "size"), [(10, 2), (10, 4), (11, 4), (3, 5), (2, 8)])
def test_ranks_share_the_windows_and_run_as_many_passes(
    count: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = windows(tmp_path, count)
    alone = Validator(held, batch_size=2, rank=0, size=1).validate(Scorer())
    parts: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: parts.append(tensor.clone()))
    scorers = [Scorer() for _ in range(size)]
    for rank, scorer in enumerate(scorers):
        Validator(held, batch_size=2, rank=rank, size=size).validate(scorer)
    assert len({tuple(scorer.shapes) for scorer in scorers}) == 1  # ZeRO-3 communicates in every forward pass
    total = torch.stack(parts).sum(dim=0)
    assert total.tolist() == list(alone.pieces.losses)
    assert sum(int((part != 0).sum()) for part in parts) == count  # no window is counted twice

    def summed(tensor: torch.Tensor) -> None:
        tensor.copy_(total)

    monkeypatch.setattr(dist, "all_reduce", summed)
    for rank in range(size):
        result = Validator(held, batch_size=2, rank=rank, size=size).validate(Scorer())
        assert result == alone


@pytest.mark.parametrize(("count", "limit", "used"), [(1, 1000, 1), (0, 1000, 0), (10, 1, 1)])
def test_fewer_than_two_windows_are_refused(count: int, limit: int, used: int, tmp_path: Path) -> None:
    with pytest.raises(CorpusError) as caught:
        Validator(windows(tmp_path, count, limit), batch_size=2, rank=0, size=1)
    assert caught.value.problem == (
        f"the held-out part has {count} windows of 4 tokens, of which validation.max_tokens allows {used}"
    )
    assert caught.value.allowed == "at least 2"
    assert "raise corpus.validation_ratio" in caught.value.action


def test_perplexity_is_the_exponential_and_stays_finite() -> None:
    assert make(math.log(50.0), 0.0).perplexity == pytest.approx(50.0)
    assert math.isfinite(make(1e6, 0.0).perplexity)


def test_result_is_logged_with_its_standard_error_if_it_has_one() -> None:
    assert str(make(1.5, 0.25)) == "1.5000 +- 0.2500"
    assert str(make(1.5, None)) == "1.5000"


def make(loss: float, stderr: float | None) -> ValidationResult:
    pieces = Pieces(windows=(0, 0, 1), documents=(0, 1, 1), tokens=(3, 1, 4), losses=(4.5, 1.5, 6.0))
    return ValidationResult(loss, stderr, 2, 4, "ab", pieces)


def test_write_keeps_format_pieces_and_the_extra_fields(tmp_path: Path) -> None:
    make(1.5, 0.25).write(tmp_path / "v.json", step=200)
    document: dict[str, Any] = json.loads((tmp_path / "v.json").read_text(encoding="utf-8"))
    assert list(document)[:2] == ["format", "step"]
    assert document == {
        "format": 2,
        "step": 200,
        "loss": 1.5,
        "stderr": 0.25,
        "windows": 2,
        "seq_len": 4,
        "tokens_sha256": "ab",
        "pieces": {
            "windows": [0, 0, 1],
            "documents": [0, 1, 1],
            "tokens": [3, 1, 4],
            "losses": [4.5, 1.5, 6.0],
        },
    }
