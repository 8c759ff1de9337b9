from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from benchmarks import coverage
from benchmarks.coverage import SEQ_LEN, SIZES, WINDOWS, Sizes

Rehearse = Callable[..., tuple[dict[str, Any], str]]


@pytest.mark.parametrize("sizes", SIZES)
def test_pieces_cover_every_window_once_and_the_largest_document_weighs_what_it_should(sizes: Sizes) -> None:
    text = coverage.draw_text(sizes, np.random.default_rng(0))
    assert np.bincount(text.windows, text.tokens).tolist() == [SEQ_LEN] * WINDOWS
    assert (np.diff(text.documents) >= 0).all()
    shares = np.bincount(text.documents, text.tokens) / text.tokens.sum()
    if sizes == "one of 35 %":
        assert shares.max() == pytest.approx(0.35, abs=0.001)
    if sizes == "equal":
        assert shares == pytest.approx(1 / coverage.DOCUMENTS, abs=1e-4)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("seeds", [1, 3])
def test_stated_intervals_contain_the_truth_as_often_as_they_say(sizes: Sizes, seeds: int) -> None:
    found = coverage.coverage(sizes, seeds, 200, 5)
    # Of 200 studies 95 % are 190, with a standard deviation of 3.
    assert 0.9 <= found["loss"] <= 0.99
    assert 0.9 <= found["difference"] <= 0.995
    # So the windows of one document are not independent, and the test can fail.
    assert found["difference_over_windows"] < (0.93 if sizes == "equal" else 0.87)


@pytest.mark.rehearsal
def test_rehearsal_counts_all_kinds(rehearse: Rehearse) -> None:
    figures, said = rehearse("coverage", "--seeds", "7")
    assert figures["studies"] == 200
    assert {(row["documents"], row["seeds"]) for row in figures["coverage"]} == {(s, n) for s in SIZES for n in (1, 3)}
    assert "one of 35 %" in said
