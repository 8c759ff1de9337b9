import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inheritune_ds.config.corpus import Corpus, Filters, TokensSource
from inheritune_ds.config.loading import load_recipe
from inheritune_ds.data.documents import sources
from inheritune_ds.data.tokens import writer
from inheritune_ds.data.tokens.journal import Journal
from inheritune_ds.data.tokens.prepare import prepare
from inheritune_ds.data.tokens.writer import Build
from inheritune_ds.errors import CorpusError, RecipeError
from tests.data.prepared import (
    END,
    TRAINED,
    Prepare,
    corpus_of,
    files_source,
    is_held,
    make_corpus,
    make_texts,
    tokens_of,
    write_jsonl,
)


def two_sources(folder: Path, *settings: dict[str, Any]) -> list[Any]:
    """Two files of 100 documents each, as sources `a` and `b`."""
    return [
        files_source(write_jsonl(folder / f"{name}.jsonl", make_texts(100, seed)), name=name, **more)
        for seed, (name, more) in enumerate(zip("ab", settings, strict=True), 1)
    ]


@pytest.mark.parametrize("max_tokens", [1, 50, 333])
@pytest.mark.parametrize("job", [1, 700, 10**6])
def test_prepare_stops_exactly_at_max_tokens(
    tmp_path: Path, prepared: Prepare, monkeypatch: pytest.MonkeyPatch, max_tokens: int, job: int
) -> None:
    texts = sorted(make_texts(60), key=lambda text: not is_held(text))
    everything = prepared(make_corpus(tmp_path, texts))
    monkeypatch.setattr(writer, "JOB_CHARACTERS", job)
    some = prepared(make_corpus(tmp_path, texts, max_tokens=max_tokens))
    assert some.train_tokens == max_tokens
    assert tokens_of(some) == tokens_of(everything)[:max_tokens]
    assert some.validation_tokens == everything.validation_tokens


def test_without_weights_max_tokens_is_for_the_sources_in_their_order(
    tmp_path: Path, prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = corpus_of(*two_sources(tmp_path, {}, {}))
    first = prepared(both).sources[0].train_tokens
    later = prepared(both.model_copy(update={"max_tokens": first + 99}))
    assert [source.train_tokens for source in later.sources] == [first, 99]
    opened = []
    documents = sources.documents

    def spy(source: Any, *rest: Any) -> Iterator[Any]:
        opened.append(source.name)
        return documents(source, *rest)

    monkeypatch.setattr(sources, "documents", spy)
    monkeypatch.setattr("inheritune_ds.data.tokens.prepare._check_tokenizer", lambda *_: {})
    early = prepared(both.model_copy(update={"max_tokens": first - 5}))
    assert [source.train_tokens for source in early.sources] == [first - 5, 0]
    assert opened == ["a"]


def test_with_weights_every_source_has_its_share_of_max_tokens(tmp_path: Path, prepared: Prepare) -> None:
    sources = two_sources(tmp_path, {"weight": 0.75}, {"weight": 0.25, "max_tokens": 190})
    corpus = corpus_of(*sources, max_tokens=800)
    assert corpus.token_limits == [600, 190]
    tokens = prepared(corpus)
    assert [source.train_tokens for source in tokens.sources] == [600, 190]
    assert tokens.train_tokens == 790


def test_a_source_with_a_weight_and_no_tokens_is_refused(tmp_path: Path, prepared: Prepare) -> None:
    sources = two_sources(tmp_path, {"weight": 1}, {"weight": 1, "filters": Filters(min_characters=10**6)})
    with pytest.raises(CorpusError, match=r"source b has a weight but no training tokens\n  do: remove it"):
        prepared(corpus_of(*sources))


@pytest.mark.parametrize("count", [1, 37, 100, 5000])
def test_max_documents_counts_held_out_ones_too(tmp_path: Path, prepared: Prepare, count: int) -> None:
    texts = make_texts(100)
    held_first = sorted(texts, key=lambda text: not is_held(text))[:1] + texts
    path = write_jsonl(tmp_path / "corpus.jsonl", held_first)
    rest = files_source(write_jsonl(tmp_path / "rest.jsonl", make_texts(30, seed=7)))
    tokens = prepared(corpus_of(files_source(path, max_documents=count), rest))
    taken = held_first[:count]
    entry = tokens.manifest["sources"][0]
    assert entry["documents"] == len(taken)
    assert entry["validation_documents"] == sum(map(is_held, taken))
    assert tokens_of(tokens).count(END) == len(taken) - sum(map(is_held, taken))


def test_filters_skip_and_count_documents(tmp_path: Path, prepared: Prepare) -> None:
    kinds = itertools.cycle([("en", 1), ("en", 2), ("de", 1)])
    texts = make_texts(90)
    records = [{"text": text, "meta": {"lang": lang, "n": n}} for text, (lang, n) in zip(texts, kinds, strict=False)]
    records.append({"text": "x" * 500, "meta": {"lang": "en", "n": 1}})
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    filters = Filters(keep={"meta.lang": ["en"]}, drop={"meta.n": [2]}, max_characters=499)
    tokens = prepared(corpus_of(files_source(path, filters=filters)))
    plain = prepared(make_corpus(tmp_path / "plain", texts[::3]))
    assert tokens_of(tokens) == tokens_of(plain)
    assert tokens_of(tokens, "validation") == tokens_of(plain, "validation")
    assert tokens.manifest["filtered_documents"] == 61


def test_skipped_records_do_not_pile_up(tmp_path: Path, prepared: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last documents of a long file pass the filter: earlier records are counted without waiting for them."""
    monkeypatch.setattr(writer, "JOB_RECORDS", 50)
    texts = make_texts(30, words=30)
    path = write_jsonl(tmp_path / "corpus.jsonl", [*(["short"] * 2000), *texts])
    longest: list[int] = []
    jobs = Build._jobs

    def watched(self: Build, documents: Any, waiting: Any) -> Iterator[Any]:
        for job in jobs(self, documents, waiting):
            longest.append(len(waiting))
            yield job

    monkeypatch.setattr(Build, "_jobs", watched)
    source = files_source(path, filters=Filters(min_characters=10))
    tokens = prepared(corpus_of(source), workers=1)
    assert tokens.manifest["filtered_documents"] == 2000
    assert max(longest) == 50


@pytest.mark.parametrize("duplicates", ["keep", "drop"])
def test_exact_copies_are_counted_across_sources_and_parts_and_dropped_if_asked_for(
    tmp_path: Path, prepared: Prepare, duplicates: str
) -> None:
    first, own = make_texts(60), make_texts(40, seed=2)
    one = files_source(write_jsonl(tmp_path / "a.jsonl", [*first, *first[:10]]))
    other = files_source(write_jsonl(tmp_path / "b.jsonl", [*first[20:40], *own]))
    tokens = prepared(corpus_of(one, other, duplicates=duplicates))
    entries = {entry["name"]: entry for entry in tokens.manifest["sources"]}
    assert {name: entry["duplicate_documents"] for name, entry in entries.items()} == {"a": 10, "b": 20}
    written = {"a": 60, "b": 40} if duplicates == "drop" else {"a": 70, "b": 60}
    assert {name: entry["documents"] for name, entry in entries.items()} == written
    if duplicates == "drop":
        assert tokens.manifest["validation_documents"] == sum(map(is_held, [*first, *own]))
    assert tokens.manifest["duplicate_documents"] == 30


def test_manifest_reports_the_overlap_with_evaluation_sets(tmp_path: Path, prepared: Prepare) -> None:
    texts = make_texts(80, words=40)
    trained = [text for text in texts if not is_held(text)]
    held = next(text for text in texts if is_held(text))
    inside = [" ".join(text.upper().split()[5:25]) + "!" for text in trained[:7]]
    nowhere = "something that appears nowhere in these few documents"
    items = [*inside, " ".join(held.split()[5:25]), nowhere, "too short"]
    evaluation = files_source(write_jsonl(tmp_path / "quiz.jsonl", items))
    tokens = prepared(make_corpus(tmp_path, texts, overlap_with=[evaluation]))
    assert tokens.manifest["overlap"] == {
        "quiz": {"ngram": 13, "items": 10, "items_too_short": 1, "items_hit": 7, "documents_hit": 7}
    }


@pytest.mark.parametrize("name", ["tokenizer", "manifest.json", "progress.sqlite"])
def test_a_source_cannot_have_the_name_of_another_thing_in_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"a source cannot have the name '{name}'"):
        Corpus(sources=[files_source(tmp_path / "a.jsonl", name=name)])
    with pytest.raises(RecipeError, match=rf"corpus: a source cannot have the name '{name}'"):
        load_recipe("quickstart", [f"corpus.sources=[{{kind: embedded, name: {name}}}]"])


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
    files: dict[str, Any] = {"train": f"{tmp_path}/train.bin", "validation": f"{tmp_path}/val.bin"}
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
