from typing import Any

import pytest
from pydantic import ValidationError

from inheritune_ds.config.corpus import Corpus, shares


def source(path: str, **settings: Any) -> dict[str, Any]:
    return {"kind": "files", "paths": [path], **settings}


def change(at: str, **weights: float) -> dict[str, Any]:
    return {"at": at, "weights": weights}


WEIGHTED = [source("a", weight=1.0), source("b", weight=3.0)]


def changed(*changes: dict[str, Any]) -> dict[str, Any]:
    return {"sources": WEIGHTED, "weight_changes": [*changes]}


def overlap(*sets: dict[str, Any]) -> dict[str, Any]:
    return {"sources": [source("a")], "overlap_with": [*sets]}


def sources(*found: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"sources": [*found], **more}


FILTERS = {"min_characters": 10, "max_characters": 5}
ALL_0 = "all weights are 0: at least one must be above 0"
FIRST, SECOND = change("2M tokens", a=1.0, b=1.0), change("1M tokens", a=1, b=1)
CASES: list[tuple[dict[str, Any], str]] = [
    (
        sources(source("a", name="x"), source("b", name="x")),
        "two sources have the name 'x': give each a name of its own",
    ),
    (sources(source("a", filters=FILTERS)), "min_characters 10 is more than max_characters 5: no document would pass"),
    (
        sources(source("a", weight=1.0), source("b")),
        "source 'b' has no weight and others have: give all of them one, or none",
    ),
    (sources(source("a", weight=0.0), source("b", weight=0.0)), ALL_0),
    (
        sources(source("a", weight=0.12345), source("b", weight=1.0)),
        "weights 0.12345, 1.0 repeat only after 22,469 windows, and at most 10,000 are allowed: write them",
    ),
    (sources(source("a"), weight_changes=[change("1M tokens", a=1.0)]), "weight_changes needs sources with weights"),
    (changed(FIRST, SECOND), "weight_changes must be sorted by `at`, each later than the one before"),
    (changed(change("0 tokens", a=1.0, b=1.0)), "the amount must be at least 1"),
    (changed(change("1M tokens", a=1.0)), "weight_changes at 1M tokens must name every source once: a, b"),
    (changed(change("1M tokens", a=0.0, b=0.0)), ALL_0),
    (
        sources(source("a", weight=1.0), source("b", weight=0.0), max_tokens=1000),
        "source 'b' with weight 0 at the start gets no tokens of max_tokens: give every source",
    ),
    (sources(*WEIGHTED, max_tokens=3), "source 'a' with weight 1 at the start gets no tokens of max_tokens"),
    (
        overlap(source("b", name="x"), source("c", name="x")),
        "two sets of overlap_with have the same name: give each a name of its own",
    ),
    (overlap(source("b", weight=1.0)), "a set of overlap_with is not trained on: remove its weight"),
    (overlap(source("b", max_tokens=5)), "a set of overlap_with is not tokenized: limit it with max_documents"),
]


@pytest.mark.parametrize(("document", "message"), CASES)
def test_an_invalid_corpus_is_refused(document: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Corpus.model_validate(document)
    (error,) = caught.value.errors()
    assert message in error["msg"]


def test_shares_are_the_smallest_integers_in_the_written_proportion() -> None:
    assert shares([67.0, 15.0, 4.5, 4.5, 4.5, 2.5, 2.0]) == [134, 30, 9, 9, 9, 5, 4]
    assert shares([0.1, 0.0, 0.2]) == [1, 0, 2]
    assert shares([0.0, 7.0]) == [0, 1]


@pytest.mark.parametrize(("own", "total"), [([None, None], 100), ([5, None], None), ([None, None], None)])
def test_without_weights_the_limits_are_those_of_the_sources(own: list[int | None], total: int | None) -> None:
    sources = [source("ab"[n], max_tokens=own[n]) for n in (0, 1)]
    assert Corpus.model_validate({"sources": sources, "max_tokens": total}).token_limits == own


def test_with_weights_a_source_has_its_share_or_less() -> None:
    sources = [source("a", weight=1.0, max_tokens=20), source("b", weight=3.0, max_tokens=80)]
    assert Corpus.model_validate({"sources": sources, "max_tokens": 102}).token_limits == [20, 76]


def test_sources_without_a_name_are_named_after_their_files_and_numbered_if_taken() -> None:
    sources = [
        source("data/books.jsonl.gz"),
        source("more/books.txt"),
        source("x", name="books-2"),
        source("wiki/*.jsonl"),
        {"kind": "hub", "dataset": "org/C4 en", "data_files": "*"},
        {"kind": "nanogpt", "train": "data/openwebtext/train.bin"},
        {"kind": "embedded"},
    ]
    names = [found.name for found in Corpus.model_validate({"sources": sources}).sources]
    assert names == ["books", "books-3", "books-2", "wiki", "C4-en", "openwebtext", "embedded"]
