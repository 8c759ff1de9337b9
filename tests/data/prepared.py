"""Corpora, tokenizers and readers for the tests of `prepare`."""

import hashlib
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from inheritune_ds.config.corpus import Corpus, FilesSource, TrainedTokenizer
from inheritune_ds.data.tokens.token_set import TokenSet
from inheritune_ds.storage.files import sha256_file
from tests import tiny

Prepare = Callable[..., TokenSet]
TRAINED = TrainedTokenizer(vocab_size=300)
END = 0
"""End-of-text id of every tokenizer in these tests."""
_WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat", "log", "and", "ran", "zebra", "hat", "12", "quick", "brown"]


def make_texts(count: int, seed: int = 1, words: int = 20) -> list[str]:
    """Different documents of `words` words."""
    draw = random.Random(seed)
    return [f"{number} {seed} " + " ".join(draw.choices(_WORDS, k=words)) for number in range(count)]


def is_held(text: str, ratio: float = 0.2) -> bool:
    """Whether a document is held out, from the definition."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 < ratio


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    """Write a file with one document per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def files_source(path: Path, **settings: Any) -> FilesSource:
    """A source of one path."""
    return FilesSource(kind="files", paths=[str(path)], **settings)


def corpus_of(*sources: Any, **settings: Any) -> Corpus:
    """A corpus of sources, a fifth of it held out."""
    return Corpus(**{"sources": [*sources], "validation_ratio": 0.2, **settings})


def make_corpus(folder: Path, texts: Iterable[str], **settings: Any) -> Corpus:
    """A corpus of one file, `corpus.jsonl` in a folder."""
    return corpus_of(files_source(write_jsonl(folder / "corpus.jsonl", texts)), **settings)


def tokens_of(tokens: TokenSet, part: str = "train", source: str = "corpus") -> list[int]:
    """Tokens in the shards of a part, read as nanoGPT reads a file."""
    (entry,) = (entry for entry in tokens.manifest["sources"] if entry["name"] == source)
    folder = tokens.folder / source
    return [
        token for shard in entry[part] for token in np.fromfile(folder / shard["file"], tokens.token_dtype).tolist()
    ]


def files_below(folder: Path) -> dict[str, str]:
    """sha256 of every file, by its path."""
    return {
        path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def names_in(folder: Path) -> list[str]:
    """Names in a folder, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


def word_level(folder: Path, vocabulary: dict[str, int], *, eos: bool = True) -> str:
    """Save a tokenizer of whole words; unknown ones become `cat`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="cat"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    family: Any = PreTrainedTokenizerFast
    family(tokenizer_object=backend, **({"eos_token": "<|endoftext|>"} if eos else {})).save_pretrained(folder)
    return str(folder)


def recipe_file(folder: Path, corpus: Corpus, tokenizer: str | TrainedTokenizer) -> Path:
    """A recipe with a corpus, for the command line (JSON is YAML)."""
    setting = tokenizer if isinstance(tokenizer, str) else tokenizer.model_dump()
    document = tiny.document(
        target={"shape": {**tiny.LLAMA, "vocab_size": 300}},
        corpus={**corpus.model_dump(mode="json"), "tokenizer": setting},
        training={"seq_len": 16, "global_batch_tokens": 16, "duration": "1 steps"},
    )
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path
