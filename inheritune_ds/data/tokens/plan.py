"""All settings and data that decide the tokens of a corpus, and their fingerprint."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from inheritune_ds.config.corpus import Corpus, Source, TokensSource, TrainedTokenizer
from inheritune_ds.data.documents import nanogpt, sources
from inheritune_ds.data.documents.change_check import FileMark
from inheritune_ds.data.tokens.token_set import TokenSet, open_finished
from inheritune_ds.data.tokens.tokenizer import backend_of, load_tokenizer, sentencepiece_model, tokenizer_sha256
from inheritune_ds.errors import CorpusError
from inheritune_ds.storage.files import read_json
from inheritune_ds.storage.known_hashes import KnownHashes, known_hashes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FORMAT = 2
"""Version of the token files: incremented when the same corpus gives other bytes."""


@dataclass(frozen=True)
class Plan:
    """All settings and data that decide the tokens, known before a document is read."""

    corpus: Corpus
    tokenizer: "PreTrainedTokenizerBase | None"
    sentencepiece: bytes | None
    shard_tokens: int
    snapshots: tuple[tuple[FileMark, ...], ...]
    identity: Mapping[str, Any]

    @classmethod
    def of(  # noqa: PLR0913, PLR0917 - one argument for each setting
        cls,
        corpus: Corpus,
        tokenizer: str | TrainedTokenizer,
        revision: str,
        shard_tokens: int,
        hashes: KnownHashes,
        known: Mapping[str, list[dict[str, Any]]] | None = None,
    ) -> Self:
        """The plan of a corpus; `known` identifies the local files that are gone, by the name of their source."""
        known = known or {}
        loaded: PreTrainedTokenizerBase | None = None
        model = None
        if isinstance(tokenizer, TrainedTokenizer):
            _check_dtype(corpus, tokenizer.vocab_size)
            entry: dict[str, Any] = {"train": tokenizer.vocab_size, "tokenizers": version("tokenizers")}
        else:
            loaded = load_tokenizer(tokenizer, revision)
            _check_eos(loaded, tokenizer)
            _check_dtype(corpus, id_space(loaded))
            model = sentencepiece_model(tokenizer, revision)
            entry = {"name": tokenizer, "sha256": tokenizer_sha256(loaded)}
            if type(backend_of(loaded).model).__name__ != "BPE":
                entry["special_tokens"] = "not matched"  # earlier token files had their ids inside documents
        for source in corpus.sources:
            if isinstance(source, TokensSource) and source.name not in known:
                nanogpt.token_files(source)
                nanogpt.check_ids(source, id_space(loaded) if loaded is not None else 0)
        # Sources are read later, when a hub branch may have moved.
        pinned = {
            "sources": [sources.pinned(source) for source in corpus.sources],
            "overlap_with": [sources.pinned(source) for source in corpus.overlap_with],
        }
        corpus = corpus.model_copy(update=pinned)
        # Taken before the files are hashed, so that every later change is detected.
        snapshots = tuple(() if source.name in known else sources.snapshot(source) for source in corpus.sources)
        settings = {"validation_ratio", "max_tokens", "token_dtype", "duplicates", "overlap_ngram"}
        identity = {
            "format": FORMAT,
            "shard_tokens": shard_tokens,
            "sources": [
                _identify(source, limit, hashes, known.get(source.name))
                for source, limit in zip(corpus.sources, corpus.token_limits, strict=True)
            ],
            "overlap_with": [
                _identify(source, source.max_tokens, hashes, known.get(source.name)) for source in corpus.overlap_with
            ],
            "tokenizer": entry,
            "corpus": corpus.model_dump(mode="json", include=settings),
        }
        return cls(corpus, loaded, model, shard_tokens, snapshots, identity)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of `identity`."""
        decisive = dict(self.identity)
        # The name of the tokenizer does not decide the tokens.
        decisive["tokenizer"] = {key: value for key, value in decisive["tokenizer"].items() if key != "name"}
        canonical = json.dumps(decisive, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def check_files(self) -> None:
        """Raise if a corpus file is gone, changed or new."""
        for source, snapshot in zip(self.corpus.sources, self.snapshots, strict=True):
            sources.check(source, snapshot)


def _identify(
    source: Source, limit: int | None, hashes: KnownHashes, known: list[dict[str, Any]] | None
) -> dict[str, Any]:
    """Data and settings of a source; its weight counts only through its share of max_tokens."""
    limits = {"name": source.name, "max_documents": source.max_documents, "max_tokens": limit}
    settings = source.model_dump(mode="json", include={"filters", "bad_records"})
    return {**limits, **settings, **sources.identify(source, hashes, known)}


def id_space(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The tokenizer's largest id plus 1; ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def _check_eos(tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    if tokenizer.eos_token_id is None:
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        raise CorpusError(
            f"tokenizer {name!r} has no eos_token, the token that ends a text",
            allowed=f"one of its special tokens: {', '.join(special) or 'none is declared'}",
            action='add a tokenizer_config.json with {"eos_token": "..."} beside its tokenizer.json '
            "(the original model's repository has one)",
        )


def _check_dtype(corpus: Corpus, ids: int) -> None:
    if corpus.token_dtype == "uint16" and ids > 2**16:  # noqa: S105  no password
        raise CorpusError(
            f"corpus.token_dtype uint16 holds 65,536 ids, but the vocabulary has {ids:,}",
            allowed="auto or uint32",
            action="set corpus.token_dtype=auto",
        )


def tokens_of_removed_text(
    corpus: Corpus, tokenizer: str | TrainedTokenizer, cache_dir: Path, revision: str, shard_tokens: int
) -> TokenSet | None:
    """The finished tokens of a corpus with local files that are gone; None if all are there, or not one set fits.

    A set fits if all other settings and data are those of the corpus, and its files may have had these names.
    """
    missing = [source for source in [*corpus.sources, *corpus.overlap_with] if sources.is_missing(source)]
    found = []
    for path in sorted((cache_dir / "tokens").glob("*/manifest.json")) if missing else ():
        manifest = read_json(path)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            continue
        parts = [*(entry["identity"] for entry in manifest["sources"]), *manifest["overlap_with"]]
        files = {entry["name"]: entry.get("files", []) for entry in parts}
        known = {source.name: files.get(source.name, []) for source in missing}
        if all(sources.may_have_been(source, [file["name"] for file in known[source.name]]) for source in missing):
            with known_hashes(cache_dir) as hashes:
                plan = Plan.of(corpus, tokenizer, revision, shard_tokens, hashes, known)
            tokens = open_finished(path.parent, plan.fingerprint)
            found += [] if tokens is None else [tokens]
    if len(found) != 1:
        return None
    names = ", ".join(source.name for source in missing)
    logger.warning("files of %s are gone; their tokens are complete in %s and are used", names, found[0].folder)
    return found[0]
