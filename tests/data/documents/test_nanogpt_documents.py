from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inheritune_ds.config.corpus import TokensSource, TrainedTokenizer
from inheritune_ds.data.documents import nanogpt_documents
from inheritune_ds.data.documents.records import Cursor
from inheritune_ds.data.tokens.prepare import prepare
from inheritune_ds.errors import CorpusError
from tests.data.prepared import END, TRAINED, Prepare, corpus_of, make_corpus, make_texts, tokens_of, word_level

Documents = list[np.ndarray[Any, np.dtype[np.uint16]]]


def make_documents(count: int, largest: int = 250, seed: int = 1) -> Documents:
    """Token documents of different lengths, each with its end."""
    draw = np.random.default_rng(seed)
    bodies = [draw.integers(1, largest, int(draw.integers(0, 40))) for _ in range(count)]
    return [np.append(body, END).astype("<u2") for body in bodies]


def write_bin(path: Path, documents: Documents) -> str:
    np.concatenate(documents).tofile(path)
    return str(path)


def source_of(train: str, **settings: Any) -> TokensSource:
    return TokensSource(kind="nanogpt", name="gpt", train=train, **settings)


def test_without_a_validation_file_documents_are_held_out(tmp_path: Path, prepared: Prepare) -> None:
    documents = make_documents(100)
    tokens = prepared(corpus_of(source_of(write_bin(tmp_path / "train.bin", documents))))
    assert 5 < tokens.manifest["validation_documents"] < 40
    parts = {}
    for part in ("train", "validation"):
        ids = np.array(tokens_of(tokens, part, "gpt"))
        starts = [0, *(np.flatnonzero(ids == END) + 1)]
        parts[part] = [tuple(ids[start:stop]) for start, stop in pairwise(starts)]
    assert sorted(parts["train"] + parts["validation"]) == sorted(tuple(document) for document in documents)
    longer = {part: {text for text in found if len(text) > 3} for part, found in parts.items()}
    assert longer["train"].isdisjoint(longer["validation"])


def test_duplicates_of_token_files_are_dropped(tmp_path: Path, prepared: Prepare) -> None:
    documents = [document for document in make_documents(60) if len(document) > 5]
    path = write_bin(tmp_path / "train.bin", [*documents, *documents[:7]])
    tokens = prepared(corpus_of(source_of(path), duplicates="drop"))
    assert tokens.manifest["duplicate_documents"] == 7
    assert tokens.manifest["train_documents"] + tokens.manifest["validation_documents"] == len(documents)


def read(source: TokensSource, start: Cursor = Cursor()) -> Iterator[nanogpt_documents.TokenDocument]:  # noqa: B008
    return nanogpt_documents.documents(source, start, eos_id=END, id_space=300, ratio=0.2)


@pytest.mark.parametrize("chunk", [1, 7, 64, 2**22])
def test_reading_resumes_from_every_document_with_any_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(nanogpt_documents, "_CHUNK_TOKENS", chunk)
    train, validation = make_documents(20), make_documents(5, seed=2)
    train[-1] = train[-1][:-1] if len(train[-1]) > 1 else np.array([5], "<u2")  # the last one lacks its end
    source = source_of(write_bin(tmp_path / "train.bin", train), validation=write_bin(tmp_path / "val.bin", validation))
    whole = list(read(source))
    assert [document.ids.tolist() for document in whole] == [part.tolist() for part in (*train, *validation)]
    assert [document.held_out for document in whole] == [False] * 20 + [True] * 5
    for number, document in enumerate(whole, 1):
        rest = [later.ids.tolist() for later in read(source, document.cursor)]
        assert rest == [later.ids.tolist() for later in whole[number:]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"does not exist\n  allowed: a header-free .*\n  do: correct train and validation"),
        (b"\1\0\2\0\3", r"has 5 bytes, not a whole number of 16-bit tokens\n  do: copy"),
        (b"", "is empty"),
        (np.arange(1, 200, dtype="<u4").tobytes(), "seems to hold 32-bit ids: every second 16-bit number"),
    ],
)
def test_prepare_refuses_a_file_that_is_not_one_of_16_bit_ids(
    tmp_path: Path, prepared: Prepare, content: bytes | None, message: str
) -> None:
    path = tmp_path / "train.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CorpusError, match=rf"token file .*train\.bin {message}"):
        prepared(corpus_of(source_of(str(path))))


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [
        (70_000, r"has 70,000 ids\n  allowed: the tokenizer that made the file"),
        (None, r"is trained on text, which token files do not hold\n.*\n  do: set corpus\.tokenizer"),
    ],
)
def test_prepare_refuses_a_tokenizer_that_cannot_have_made_the_file(
    tmp_path: Path, vocab_size: int | None, message: str
) -> None:
    tokenizer: str | TrainedTokenizer = TRAINED
    if vocab_size:
        tokenizer = word_level(tmp_path / "words", {"<|endoftext|>": END, "cat": 1, "dog": vocab_size - 1})
    path = write_bin(tmp_path / "train.bin", make_documents(5))
    with pytest.raises(CorpusError, match=rf"train\.bin holds 16-bit ids, but the tokenizer {message}"):
        prepare(corpus_of(source_of(path)), tokenizer, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_prepare_names_the_place_of_an_id_beyond_the_vocabulary(tmp_path: Path, prepared: Prepare) -> None:
    documents = [*make_documents(50), np.array([5, 60_000, END], "<u2")]
    place = sum(map(len, documents[:-1])) + 1
    text = make_corpus(tmp_path, make_texts(40)).sources[0]
    corpus = corpus_of(text, source_of(write_bin(tmp_path / "train.bin", documents)))
    message = rf"train\.bin has the id 60000 at token {place:,}, but the tokenizer has ids up to \d+\n"
    with pytest.raises(CorpusError, match=message):
        prepared(corpus)


def test_prepare_refuses_a_file_without_end_of_text_tokens(
    tmp_path: Path, prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nanogpt_documents, "_CHUNK_TOKENS", 500)
    monkeypatch.setattr(nanogpt_documents, "MAX_DOCUMENT_TOKENS", 2000)
    path = write_bin(tmp_path / "train.bin", [np.array([5, END], "<u2"), np.full(5000, 7, "<u2")])
    message = r"no end-of-text token \(id 0\) among 2,000 tokens from position 2\n  allowed: documents of at most 2,000"
    with pytest.raises(CorpusError, match=message):
        prepared(corpus_of(source_of(path)))
