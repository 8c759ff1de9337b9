"""Where a source with a limit or an error ends, and its held-out and kept documents."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inheritune_ds.config.corpus import Corpus, Filters, TokensSource
from inheritune_ds.data.tokens import writer
from inheritune_ds.data.tokens.journal import Journal
from inheritune_ds.data.tokens.prepare import prepare
from inheritune_ds.errors import CorpusError
from tests.data.prepared import (
    END,
    TRAINED,
    Prepare,
    corpus_of,
    files_source,
    is_held,
    make_texts,
    tokens_of,
    write_jsonl,
)

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
    tmp_path: Path, prepared: Prepare, own: dict[str, Any], whole: dict[str, Any], tokens: int
) -> None:
    train = write_tokens(tmp_path / "train.bin", 0, 50)
    validation = write_tokens(tmp_path / "val.bin", 50, 20)
    files = {"train": f"{tmp_path}/train.bin", "validation": f"{tmp_path}/val.bin"}
    found = prepared(Corpus(sources=[TokensSource(kind="nanogpt", name="corpus", **files, **own)], **whole))
    assert tokens_of(found) == train[:tokens]
    assert tokens_of(found, "validation") == validation
    assert found.manifest["train_documents"] == -(-tokens // DOCUMENT_TOKENS)
    assert found.manifest["validation_documents"] == 20


def test_limits_of_token_files_end_the_held_out_documents_too_without_a_validation_file(
    tmp_path: Path, prepared: Prepare
) -> None:
    ids = write_tokens(tmp_path / "train.bin", 0, 50)
    source = TokensSource(kind="nanogpt", name="corpus", train=f"{tmp_path}/train.bin", max_documents=20)
    found = prepared(corpus_of(source, validation_ratio=0.3))
    assert sorted(tokens_of(found) + tokens_of(found, "validation")) == sorted(ids[:200])
    assert found.manifest["train_documents"] + found.manifest["validation_documents"] == 20


@pytest.mark.parametrize("pieces", [1, 7, 512])
def test_a_bad_record_behind_the_limit_is_ignored(
    tmp_path: Path, prepared: Prepare, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    monkeypatch.setattr(writer, "JOB_PIECES", pieces)
    path = write_jsonl(tmp_path / "corpus.jsonl", make_texts(60))
    wanted = prepared(corpus_of(files_source(path)))
    path.write_text(path.read_text() + "{no record\n")
    found = prepared(corpus_of(files_source(path, max_documents=60)))
    assert tokens_of(found) == tokens_of(wanted)
    with pytest.raises(CorpusError, match=r"corpus\.jsonl:61: not a JSON object"):
        prepared(corpus_of(files_source(path, max_documents=61)))


def test_skipped_documents_are_not_read_again_after_an_error(
    tmp_path: Path, prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "COMMIT_INTERVAL_S", -1.0)
    path = write_jsonl(tmp_path / "corpus.jsonl", [*make_texts(40), *["short"] * 20])
    path.write_text(path.read_text() + "{no record\n")
    source = files_source(path, filters=Filters(min_characters=20))
    with pytest.raises(CorpusError, match=r"corpus\.jsonl:61: not a JSON object"):
        prepared(corpus_of(source))
    (partial,) = (tmp_path / "cache" / "tokens").iterdir()
    state = Journal(partial).state()
    assert state is not None
    assert state["current"]["cursor"] == [0, 60]
    assert (state["current"]["documents"], state["current"]["counts"]["filtered_documents"]) == (40, 20)


def test_a_tokenizer_is_trained_on_the_documents_that_a_limit_leaves(tmp_path: Path) -> None:
    texts = make_texts(80)
    few, all_of_them = write_jsonl(tmp_path / "few.jsonl", texts[:30]), write_jsonl(tmp_path / "corpus.jsonl", texts)

    def trained(path: Path, **limits: int) -> str:
        found = prepare(corpus_of(files_source(path, name="corpus", **limits)), TRAINED, tmp_path / "cache")
        return str(found.manifest["tokenizer"]["sha256"])

    assert trained(all_of_them, max_documents=30) == trained(few) != trained(all_of_them)


def test_overlap_respects_the_limit_of_a_set_and_skips_token_files(
    tmp_path: Path, prepared: Prepare, logged: Callable[[], list[str]]
) -> None:
    write_tokens(tmp_path / "train.bin", 0, 50)
    texts = make_texts(40)
    items = files_source(write_jsonl(tmp_path / "items.jsonl", texts), max_documents=15)
    read = files_source(write_jsonl(tmp_path / "corpus.jsonl", texts))
    imported = TokensSource(kind="nanogpt", name="imported", train=f"{tmp_path}/train.bin")
    found = prepared(corpus_of(read, imported, overlap_with=[items]))
    overlap = found.manifest["overlap"]["items"]
    assert (overlap["items"], overlap["items_hit"]) == (15, sum(not is_held(text) for text in texts[:15]))
    assert logged() == ["WARNING: overlap is not checked in imported: token files hold no text"]
