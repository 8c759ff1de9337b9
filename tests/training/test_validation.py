import hashlib
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
from inheritune_ds.errors import CorpusError
from inheritune_ds.training.validation import ValidationResult, Validator

SEQ_LEN = 4
Losses = list[npt.NDArray[np.float64]]


def windows(folder: Path, count: int) -> HeldOut:
    tokens = np.arange(count * SEQ_LEN + 1, dtype="<u2")
    (folder / "validation.bin").write_bytes(tokens.tobytes())
    return HeldOut({"tokens": Windows.of_file(folder / "validation.bin", "uint16", SEQ_LEN, len(tokens))})


class Scorer:
    """A window's loss is a fixed irregular number, so a mixed-up order would show."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    @staticmethod
    def loss_of(window: int) -> float:
        return 1.0 + math.sin(1.7 * window) + 0.01 * window

    def window_losses(self, batches: list[npt.NDArray[np.int64]]) -> Losses:
        self.shapes += [batch.shape for batch in batches]
        return [np.array([self.loss_of(int(row[0]) // SEQ_LEN) for row in batch]) for batch in batches]


@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
def test_validate_gives_mean_and_standard_error(batch_size: int, tmp_path: Path) -> None:
    validator = Validator(windows(tmp_path, 10), max_tokens=1000, batch_size=batch_size, rank=0, size=1)
    scorer = Scorer()
    result = validator.validate(scorer)
    expected = [Scorer.loss_of(window) for window in range(10)]
    assert result.windows == tuple(expected)
    assert result.loss == pytest.approx(statistics.fmean(expected), rel=1e-15)
    assert result.stderr == pytest.approx(statistics.stdev(expected) / math.sqrt(10), rel=1e-12)
    assert sum(shape[0] for shape in scorer.shapes) == 10
    assert all(shape[0] <= batch_size and shape[1] == SEQ_LEN + 1 for shape in scorer.shapes)


def test_validate_takes_the_first_windows_up_to_max_tokens_and_hashes_them(tmp_path: Path) -> None:
    validator = Validator(windows(tmp_path, 10), max_tokens=7 * SEQ_LEN + 3, batch_size=2, rank=0, size=1)
    result = validator.validate(Scorer())
    assert validator.count == 7
    assert result.windows == tuple(Scorer.loss_of(window) for window in range(7))
    assert validator.validate(Scorer()) == result, "a repeat is the same"
    assert result.seq_len == SEQ_LEN
    used = np.arange(7 * SEQ_LEN + 1, dtype="<u4")
    assert result.tokens_sha256 == hashlib.sha256(used.tobytes()).hexdigest()
    np.arange(10 * SEQ_LEN + 1, dtype="<u4").tofile(tmp_path / "wide.bin")
    wide = HeldOut({"tokens": Windows.of_file(tmp_path / "wide.bin", "uint32", SEQ_LEN, 10 * SEQ_LEN + 1)})
    assert wide.sha256(7) == result.tokens_sha256, "the integer type does not count"
    assert wide.sha256(8) != result.tokens_sha256


@pytest.mark.parametrize(("count", "size"), [(10, 2), (10, 4), (11, 4), (3, 5), (2, 8)])
def test_ranks_share_the_windows_and_run_as_many_passes(
    count: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = windows(tmp_path, count)
    alone = Validator(held, max_tokens=1000, batch_size=2, rank=0, size=1).validate(Scorer())
    parts: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: parts.append(tensor.clone()))
    scorers = [Scorer() for _ in range(size)]
    for rank, scorer in enumerate(scorers):
        Validator(held, max_tokens=1000, batch_size=2, rank=rank, size=size).validate(scorer)
    assert len({tuple(scorer.shapes) for scorer in scorers}) == 1  # ZeRO-3 communicates in every forward pass
    total = torch.stack(parts).sum(dim=0)
    assert total.tolist() == list(alone.windows)
    assert sum(int((part != 0).sum()) for part in parts) == count  # no window is counted twice

    def summed(tensor: torch.Tensor) -> None:
        tensor.copy_(total)

    monkeypatch.setattr(dist, "all_reduce", summed)
    for rank in range(size):
        result = Validator(held, max_tokens=1000, batch_size=2, rank=rank, size=size).validate(Scorer())
        assert result == alone


@pytest.mark.parametrize(("count", "max_tokens", "used"), [(1, 1000, 1), (0, 1000, 0), (10, 7, 1)])
def test_fewer_than_two_windows_are_refused(count: int, max_tokens: int, used: int, tmp_path: Path) -> None:
    with pytest.raises(CorpusError) as caught:
        Validator(windows(tmp_path, count), max_tokens=max_tokens, batch_size=2, rank=0, size=1)
    assert caught.value.problem == (
        f"the held-out part has {count} windows of 4 tokens, of which "
        f"validation.max_tokens = {max_tokens} allows {used}"
    )
    assert caught.value.allowed == "at least 2"
    assert "raise corpus.validation_ratio" in caught.value.action


def test_perplexity_is_the_exponential_and_stays_finite() -> None:
    assert ValidationResult(math.log(50.0), 0.0, (), 4, "").perplexity == pytest.approx(50.0)
    assert math.isfinite(ValidationResult(1e6, 0.0, (), 4, "").perplexity)


def test_write_keeps_every_window_and_the_extra_fields(tmp_path: Path) -> None:
    ValidationResult(1.5, 0.25, (1.0, 2.0), 4, "ab").write(tmp_path / "v.json", step=200)
    document: dict[str, Any] = json.loads((tmp_path / "v.json").read_text(encoding="utf-8"))
    result = {"loss": 1.5, "stderr": 0.25, "windows": [1.0, 2.0], "seq_len": 4, "tokens_sha256": "ab"}
    assert document == {"step": 200, **result}
    assert next(iter(document)) == "step"
