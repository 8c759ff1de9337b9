"""Training tokens of a corpus: counted from its token files if they exist, otherwise estimated."""

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inheritune_ds.config.corpus import (
    Corpus,
    EmbeddedSource,
    FilesSource,
    HubSource,
    Source,
    TokensSource,
    TrainedTokenizer,
)
from inheritune_ds.data.documents import python_docs
from inheritune_ds.data.documents.files import expand
from inheritune_ds.data.documents.nanogpt import token_files
from inheritune_ds.data.documents.sources import is_missing, may_have_been
from inheritune_ds.plan.budget import Tokens
from inheritune_ds.plan.model_size import GIB

_BYTES_A_TOKEN = 4.0
"""Between English text (4.4: OpenWebText's 39.8 GB are 9.04B tokens of GPT-2) and code (3.6 with 4,096 entries)."""
_EMBEDDED_BYTES_A_TOKEN = 3.56
"""With the quickstart's 4,096 entries; `tests/data/test_size.py` compares it with the tokens that `prepare` counts."""
_EXPANSION = {".gz": 3.0, ".bz2": 3.5, ".zst": 3.0, ".parquet": 1.7}
"""Bytes of text per byte of file. Parquet: OpenWebText's 39.8 GB of text are 24 GB of parquet."""


def count_tokens(corpus: Corpus, cache_dir: Path) -> Tokens | None:
    """Training tokens of a corpus; None if its token files, its limits and its size are all unknown.

    Raises a CorpusError if a corpus file is missing.
    """
    similar = None
    for path in sorted((cache_dir / "tokens").glob("*/manifest.json")):
        try:
            manifest = json.loads(path.read_bytes())
            counts = tuple(int(source["train_tokens"]) for source in manifest["sources"])
            if _same_corpus(corpus, manifest):
                if _same_tokenizer(corpus, manifest["tokenizer"]):
                    return Tokens(counts, estimate=False)
                similar = Tokens(counts, estimate=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not a finished manifest of this version: the run logs that it tokenizes the corpus again
    if similar is not None and any(map(is_missing, corpus.sources)):
        return similar  # their sizes are not known any more
    return estimate_tokens(corpus)


def _same_corpus(corpus: Corpus, manifest: Mapping[str, Any]) -> bool:
    """Whether token files were made from the sources of this corpus, compared without reading documents.

    Training also compares the hashes of all files.
    """
    settings = corpus.model_dump(mode="json", include=set(manifest["corpus"]))
    identities = [source["identity"] for source in manifest["sources"]]
    return (
        manifest["corpus"] == settings
        and len(identities) == len(corpus.sources)
        and all(map(_same_source, corpus.sources, corpus.token_limits, identities))
    )


def _same_tokenizer(corpus: Corpus, entry: Mapping[str, Any]) -> bool:
    """Whether token files have this corpus's own tokenizer; the name of the reference's is not known here."""
    tokenizer = corpus.tokenizer
    if isinstance(tokenizer, TrainedTokenizer):
        return bool(entry.get("train") == tokenizer.vocab_size)
    return tokenizer is not None and bool(entry.get("name") == tokenizer)


def _same_source(source: Source, limit: int | None, identity: Mapping[str, Any]) -> bool:
    settings = source.model_dump(mode="json", exclude={"weight", "max_tokens"})
    known = all(settings[key] == identity[key] for key in settings.keys() & identity.keys())
    if not known or limit != identity["max_tokens"]:
        return False
    if isinstance(source, EmbeddedSource):
        return bool(identity["python"] == platform.python_version())
    if isinstance(source, HubSource):
        return True
    if is_missing(source):
        return may_have_been(source, [file["name"] for file in identity["files"]])
    paths = expand(source.paths) if isinstance(source, FilesSource) else token_files(source)
    files = [(path.name, path.stat().st_size) for path in paths]
    return files == [(file["name"], file["size"]) for file in identity["files"]]


def estimate_tokens(corpus: Corpus) -> Tokens | None:
    """Estimate the training tokens of a corpus without token files: a published count or bytes / 4, up to its limits.

    A limit replaces a size that is not known. Errors as in `count_tokens`.
    """
    sizes = [_tokens(source) for source in corpus.sources]
    share = 1.0 - corpus.validation_ratio
    found = [
        min((bound for bound in (limit, None if size is None else size * share) if bound is not None), default=None)
        for limit, size in zip(corpus.token_limits, sizes, strict=True)
    ]
    known = [tokens for tokens in found if tokens is not None]
    if len(known) < len(found):
        return None if corpus.max_tokens is None else Tokens((corpus.max_tokens,), estimate=True)
    return Tokens((min(int(sum(known)), corpus.max_tokens or int(sum(known))),), estimate=True)


def _tokens(source: Source) -> float | None:
    """Tokens of a source, held-out ones included; None for a hub dataset of unknown size."""
    if isinstance(source, EmbeddedSource):
        return sum(len(text.encode()) for text in python_docs.running().documents) / _EMBEDDED_BYTES_A_TOKEN
    if isinstance(source, FilesSource):
        size = sum(path.stat().st_size * _expansion(path.name) for path in expand(source.paths))
        return size / _BYTES_A_TOKEN
    if isinstance(source, TokensSource):
        return sum(path.stat().st_size for path in token_files(source)) / 2
    if source.published_tokens is not None or source.download_gib is None:
        return source.published_tokens
    return source.download_gib * GIB * _expansion(source.data_files) / _BYTES_A_TOKEN


def _expansion(name: str) -> float:
    return _EXPANSION.get(Path(name).suffix, 1.0)
