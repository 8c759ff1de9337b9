"""Books, textbooks, web pages and papers: tokens as the tokenizers' own libraries count them, document by document."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inheritune_ds.config.corpus import Corpus, FilesSource
from inheritune_ds.data.tokens.prepare import prepare
from tests.data.prepared import is_held

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
