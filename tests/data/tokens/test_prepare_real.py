"""Books, textbooks, web pages and papers: tokens as the tokenizers' own libraries count them, document by document."""

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.tokenize import watch
from inheritune_ds.config.corpus import Corpus, FilesSource
from inheritune_ds.data.tokens.prepare import prepare
from inheritune_ds.data.tokens.token_set import open_finished
from tests.data.prepared import files_source, is_held, make_corpus, make_texts, recipe_file, write_jsonl

RATIO = 0.05
CORPORA = {
    "books": ("books/books-01-of-04.jsonl.gz", 0.3),
    "textbooks": ("openstax/introduction_to_philosophy.jsonl.gz", 0.2),
    "openwebtext": ("openwebtext_1000.jsonl.gz", 0.4),
    "arxiv": ("redpajama_arxiv_sample.jsonl.gz", 0.1),
}
BOOKS = 2
"""Of 16 in that file: a test has no time for more."""


def texts_of(folder: Path, pattern: str, most: int | None) -> list[str]:
    """The documents of a source, read without the package."""
    texts: list[str] = []
    for path in sorted(folder.glob(pattern)):
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            texts += [json.loads(line)["text"] for line in stream]
    return texts[:most]


def encoder_of(folder: Path, kind: str) -> Callable[[str], list[int]]:
    """Encode a whole document with the library the tokenizer was made for, its end of text among the ids."""
    if kind == "gpt2":
        from tokenizers import Tokenizer

        backend: Any = Tokenizer.from_file(str(folder / "gpt2" / "tokenizer.json"))
        backend.encode_special_tokens = True
        return lambda text: [*backend.encode(text).ids, 50256]
    from sentencepiece import SentencePieceProcessor

    processor: Any = SentencePieceProcessor(model_file=str(folder / "llama" / "tokenizer.model"))
    return lambda text: [1, *processor.encode(text), 2]


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_tokens_of_real_corpora_are_those_of_the_tokenizer_s_own_library(
    shared: Path, tmp_path: Path, tokenizer_folder: Callable[..., str], kind: str
) -> None:
    sources: list[Any] = [
        FilesSource(
            kind="files",
            name=name,
            paths=[str(shared / "corpora" / pattern)],
            weight=weight,
            max_documents=BOOKS if name == "books" else None,
        )
        for name, (pattern, weight) in CORPORA.items()
    ]
    corpus = Corpus(sources=sources, validation_ratio=RATIO)
    file = "gpt2/tokenizer.json" if kind == "gpt2" else "llama/tokenizer.model"
    tokenizer = tokenizer_folder(**{Path(file).name.replace(".", "__"): file})
    tokens = prepare(corpus, tokenizer, tmp_path / "cache", workers=2, shard_tokens=200_000)
    encode = encoder_of(shared / "tokenizers", kind)
    for source in tokens.sources:
        texts = texts_of(shared / "corpora", CORPORA[source.name][0], BOOKS if source.name == "books" else None)
        expected = {
            part: np.array([i for text in texts if is_held(text, RATIO) is held for i in encode(text)], np.int64)
            for part, held in (("train", False), ("validation", True))
        }
        assert (source.train_tokens, sum(shard.tokens for shard in source.validation)) == tuple(
            map(len, expected.values())
        ), source.name
        for part, shards in (("train", source.train), ("validation", source.validation)):
            files = [np.fromfile(shard.path, "<u2").astype(np.int64) for shard in shards]
            assert np.array_equal(np.concatenate([np.zeros(0, np.int64), *files]), expected[part])


LONG_BYTES = 50 * 10**6
MOST_BYTES = 10**9
END_OF_TEXT = 50256


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.timeout(600)
def test_prepare_encodes_a_document_of_50_mb_exactly_in_less_than_1_gb(
    shared: Path, tmp_path: Path, tokenizer_folder: Callable[..., str]
) -> None:
    from tokenizers import Tokenizer

    with gzip.open(shared / "corpora" / "openstax" / "us_history.jsonl.gz", "rt", encoding="utf-8") as stream:
        chapter = "".join(json.loads(next(stream))["text"] + "\n\n" for _ in range(20))
    times = LONG_BYTES // len(chapter.encode()) + 1
    long_one = f"{chapter * times}the end"
    # The pre-tokenizer cuts at white space, so every chapter but the last has the ids that it has before another one.
    backend: Any = Tokenizer.from_file(str(shared / "tokenizers" / "gpt2" / "tokenizer.json"))
    last, two, three = (backend.encode(f"{chapter * count}the end").ids for count in (1, 2, 3))
    each = two[: len(two) - len(last)]
    assert three == each * 2 + last
    expected = np.array([*each * (times - 1), *last, END_OF_TEXT], np.uint16)

    short = make_corpus(tmp_path, make_texts(20))
    alone: Any = files_source(write_jsonl(tmp_path / "long.jsonl", [long_one]), name="long")
    corpus = short.model_copy(update={"sources": [*short.sources, alone]})
    tokenizer = tokenizer_folder(tokenizer__json="gpt2/tokenizer.json")
    command = [sys.executable, "-m", "inheritune_ds", "prepare", "--workers", "2"]
    command += ["--recipe", str(recipe_file(tmp_path, corpus, tokenizer)), "--cache-dir", str(tmp_path / "cache")]
    watched = watch(command)
    assert watched["processes"] >= 3, "no workers were started"
    assert watched["peak_rss_bytes"] < MOST_BYTES
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    tokens = open_finished(folder, folder.name)
    assert tokens is not None
    source = tokens.sources[1]
    (shard,) = source.validation if is_held(long_one) else source.train
    assert np.array_equal(np.fromfile(shard.path, "<u2"), expected)
    assert tokens.manifest["forced_cuts"] == 0
