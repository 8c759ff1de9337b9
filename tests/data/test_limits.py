"""Where a source ends that has a limit, and what is held out of it then."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inheritune_ds.corpus import Corpus, TokensSource
from inheritune_ds.data.tokenize import prepare
from tests.data.prepared import END, tokens_of

DOCUMENT_TOKENS = 10


def write_tokens(path: Path, first: int, count: int) -> list[int]:
    """A token file of different documents; returns its ids."""
    ids = [
        token
        for number in range(first, first + count)
        for token in (*(1 + number // 10**place % 10 for place in range(DOCUMENT_TOKENS - 1)), END)
    ]
    np.array(ids, "<u2").tofile(path)
    return ids


@pytest.mark.parametrize(
    ("own", "whole", "tokens"),
    [
        ({}, {}, 500),
        ({"max_tokens": 205}, {}, 205),
        ({"max_tokens": 500}, {}, 500),
        ({"max_documents": 30}, {}, 300),
        ({"max_documents": 60}, {}, 500),
        ({"weight": 1.0}, {"max_tokens": 200}, 200),
        ({}, {"max_tokens": 200}, 200),
    ],
)
def test_limits_of_token_files_leave_their_validation_file_whole(
    tmp_path: Path, bpe: str, own: dict[str, Any], whole: dict[str, Any], tokens: int
) -> None:
    train = write_tokens(tmp_path / "train.bin", 0, 50)
    validation = write_tokens(tmp_path / "val.bin", 50, 20)
    source = TokensSource(
        kind="nanogpt", name="corpus", train=f"{tmp_path}/train.bin", validation=f"{tmp_path}/val.bin", **own
    )
    found = prepare(Corpus(sources=[source], **whole), bpe, tmp_path / "cache")
    assert tokens_of(found) == train[:tokens]
    assert tokens_of(found, "validation") == validation
    assert (found.train_documents, found.validation_documents) == (-(-tokens // DOCUMENT_TOKENS), 20)


def test_limits_of_token_files_end_the_held_out_documents_too_without_a_validation_file(
    tmp_path: Path, bpe: str
) -> None:
    ids = write_tokens(tmp_path / "train.bin", 0, 50)
    source = TokensSource(kind="nanogpt", name="corpus", train=f"{tmp_path}/train.bin", max_documents=20)
    found = prepare(Corpus(sources=[source], validation_ratio=0.3), bpe, tmp_path / "cache")
    assert sorted(tokens_of(found) + tokens_of(found, "validation")) == sorted(ids[:200])
    assert found.train_documents + found.validation_documents == 20
