"""Tokens are found by the content of their corpus: moved files, and text that was removed after tokenization."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from inheritune_ds.config.corpus import Corpus, FilesSource, TokensSource
from inheritune_ds.data.documents import sources
from inheritune_ds.data.size import count_tokens
from inheritune_ds.data.tokens.prepare import prepare
from inheritune_ds.errors import CorpusError
from inheritune_ds.storage import known_hashes
from tests.data.prepared import Prepare, corpus_of, files_source, make_corpus, make_texts, write_jsonl


def test_a_moved_corpus_has_the_same_tokens(tmp_path: Path, prepared: Prepare) -> None:
    first = prepared(make_corpus(tmp_path / "old", make_texts(40)))
    shutil.move(tmp_path / "old", tmp_path / "new")
    assert prepared(corpus_of(files_source(tmp_path / "new" / "corpus.jsonl"))) == first


@pytest.mark.parametrize("pattern", ["corpus.jsonl", "*.jsonl", "."])
def test_removed_text_is_not_needed_once_it_is_tokenized(
    tmp_path: Path, prepared: Prepare, pattern: str, logged: Callable[[], list[str]]
) -> None:
    write_jsonl(tmp_path / "text" / "corpus.jsonl", make_texts(40))
    corpus = corpus_of(files_source(tmp_path / "text" / pattern, name="c"))
    first = prepared(corpus)
    shutil.rmtree(tmp_path / "text")
    logged()
    assert prepared(corpus) == first
    assert logged() == [f"WARNING: files of c are gone; their tokens are complete in {first.folder} and are used"]
    counted = count_tokens(corpus, tmp_path / "cache")
    assert counted is not None
    assert (counted.parts, counted.estimate) == ((first.train_tokens,), True)


@pytest.mark.parametrize(
    "other",
    [
        lambda folder, _: corpus_of(files_source(folder / "other.jsonl", name="corpus")),
        lambda _, corpus: corpus.model_copy(update={"validation_ratio": 0.3}),
        lambda folder, _: corpus_of(files_source(folder / "corpus.jsonl", text_field="body")),
    ],
    ids=["another name", "another ratio", "another field"],
)
def test_removed_text_is_missed_by_another_corpus(
    tmp_path: Path, prepared: Prepare, corpus: Corpus, other: Callable[[Path, Corpus], Corpus]
) -> None:
    prepared(corpus)
    (tmp_path / "corpus.jsonl").unlink()
    with pytest.raises(CorpusError, match="matches no file"):
        prepared(other(tmp_path, corpus))


def test_removed_text_is_missed_if_two_token_sets_fit(tmp_path: Path, prepared: Prepare) -> None:
    for seed in (1, 2):
        corpus = make_corpus(tmp_path, make_texts(40, seed=seed))
        prepared(corpus)
    (tmp_path / "corpus.jsonl").unlink()
    with pytest.raises(CorpusError, match="matches no file"):
        prepared(corpus)


def test_files_that_are_there_are_compared_where_others_are_gone(tmp_path: Path, prepared: Prepare) -> None:
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", make_texts(40, seed=seed)) for seed, name in enumerate("ab")]
    corpus = corpus_of(*map(files_source, paths))
    first = prepared(corpus)
    paths[0].unlink()
    assert prepared(corpus) == first
    write_jsonl(paths[1], make_texts(41, seed=1))
    with pytest.raises(CorpusError, match="matches no file"):
        prepared(corpus)


def test_no_file_of_the_corpus_is_hashed_twice(
    tmp_path: Path, prepared: Prepare, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_hashes, "_SETTLED_NS", -1)
    first = prepared(corpus)

    def refuse(*_: object) -> str:
        raise AssertionError

    monkeypatch.setattr(known_hashes, "sha256_file", refuse)
    assert prepared(corpus) == first


def test_may_have_been_compares_names(tmp_path: Path) -> None:
    source = FilesSource(kind="files", paths=["data/a.jsonl", "more/*.txt"])
    assert sources.is_missing(source)
    assert sources.may_have_been(source, ["a.jsonl", "x.txt", "y.txt"])
    assert not sources.may_have_been(source, ["b.jsonl"])
    tokens = TokensSource(kind="nanogpt", train=str(tmp_path / "train.bin"))
    assert sources.may_have_been(tokens, ["train.bin"])
    assert not sources.may_have_been(tokens, ["other.bin"])


def test_prepare_reads_the_corpus_where_no_tokens_fit(tmp_path: Path, bpe: str) -> None:
    with pytest.raises(CorpusError, match="matches no file"):
        prepare(corpus_of(files_source(tmp_path / "gone.jsonl")), bpe, tmp_path / "cache")
