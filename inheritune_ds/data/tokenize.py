"""Documents to token files: made once, found again by a fingerprint of everything that decides them.

`cache/tokens/<fingerprint>/` holds `train.bin` and `validation.bin` (header-free little-endian
integers), `tokenizer/` (a Hugging Face folder) and `manifest.json`. A document becomes what the
tokenizer makes of it with its own special tokens (LLaMA's puts <s> in front, GPT-2's nothing),
then one end-of-text token; documents follow one another without padding.
"""

import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from inheritune_ds.corpus import Corpus, EmbeddedSource, Source, TrainedTokenizer
from inheritune_ds.data import embedded, sources
from inheritune_ds.data.progress import Meter
from inheritune_ds.data.token_set import TokenSet, find_damage, open_finished
from inheritune_ds.data.vocabulary import backend_of, load_tokenizer, tokenizer_sha256, train_tokenizer
from inheritune_ds.errors import CorpusError
from inheritune_ds.files import storage_errors, write_json
from inheritune_ds.publish import describe_files, staged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenSet", "held_out", "load_tokenizer", "prepare"]

FORMAT = 1
"""Version of the token files: raised whenever the same corpus would give other bytes."""

_BATCH_CHARACTERS = 2**20
_BATCH_DOCUMENTS = 512


def prepare(
    corpus: Corpus,
    tokenizer: str | TrainedTokenizer,
    cache_dir: Path,
    *,
    revision: str = "main",
    say: Callable[[str], None] = print,
) -> TokenSet:
    """Return the tokens of a corpus, made now unless they are there, every file as it was written.

    Args:
        corpus: What to read.
        tokenizer: Hub id, local folder, or how to train one.
        cache_dir: The cache; tokens appear under `tokens/`, whole or not at all.
        revision: Of a tokenizer on the hub.
        say: Prints one line: that damaged tokens are made anew.

    Raises:
        CorpusError: A corpus file is missing or damaged, a part is empty, or the tokens do not fit.
        HubError: The hub is needed and cannot be reached.
        StorageError: The cache cannot be written.
    """
    plan = _Plan.of(corpus, tokenizer, revision)
    folder = plan.folder(cache_dir)
    found = open_finished(folder, plan.fingerprint)
    damage = find_damage(found) if found else None
    if damage:
        say(f"WARNING: the tokens in {folder} are damaged and are made anew from the corpus: {damage}")
    if found is None or damage:
        with staged(folder, plan.is_intact) as staging:
            _build(plan, staging)
        found = open_finished(folder, plan.fingerprint)
        assert found is not None  # published a line above, or by the process that was first
    return found


def held_out(text: str, ratio: float) -> bool:
    """Whether a document belongs to the validation part: a function of its text alone.

    Args:
        text: The document.
        ratio: Share of all documents; compared with the first 8 bytes (big-endian) of the sha256
            of the text as a fraction of 2**64.
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < ratio * 2**64


@dataclass(frozen=True)
class _Plan:
    """All that decides the tokens, known before a document is read."""

    corpus: Corpus
    tokenizer: "PreTrainedTokenizerBase | None"
    identity: Mapping[str, Any]

    @classmethod
    def of(cls, corpus: Corpus, tokenizer: str | TrainedTokenizer, revision: str) -> Self:
        loaded: PreTrainedTokenizerBase | None = None
        if isinstance(tokenizer, TrainedTokenizer):
            _check_dtype(corpus, tokenizer.vocab_size)
            spoken: dict[str, Any] = {"train": tokenizer.vocab_size, "tokenizers": version("tokenizers")}
        else:
            loaded = load_tokenizer(tokenizer, revision)
            _check_eos(loaded, tokenizer)
            _check_dtype(corpus, _id_space(loaded))
            spoken = {"name": tokenizer, "sha256": tokenizer_sha256(loaded)}
        identity = {
            "format": FORMAT,
            "sources": [sources.identify(source) for source in corpus.sources],
            "tokenizer": spoken,
            "corpus": corpus.model_dump(include={"validation_ratio", "max_tokens", "token_dtype"}),
        }
        return cls(corpus, loaded, identity)

    @property
    def fingerprint(self) -> str:
        decisive = dict(self.identity)
        # The same tokenizer under another name gives the same tokens.
        decisive["tokenizer"] = {key: value for key, value in decisive["tokenizer"].items() if key != "name"}
        canonical = json.dumps(decisive, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def folder(self, cache_dir: Path) -> Path:
        return cache_dir / "tokens" / self.fingerprint

    def is_intact(self, folder: Path) -> bool:
        found = open_finished(folder, self.fingerprint)
        return found is not None and find_damage(found) is None


def _id_space(tokenizer: "PreTrainedTokenizerBase") -> int:
    """One more than the largest id; ids need not be without gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def _check_eos(tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    if tokenizer.eos_token_id is None:
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        raise CorpusError(
            f"tokenizer {name!r} does not say which token ends a text (it has no eos_token)",
            allowed=f"one of its special tokens: {', '.join(special) or 'none is declared'}",
            action='put a tokenizer_config.json with {"eos_token": "..."} beside its tokenizer.json '
            "(the original model's repository has one)",
        )


def _check_dtype(corpus: Corpus, id_space: int) -> None:
    if corpus.token_dtype == "uint16" and id_space > 2**16:  # noqa: S105  no password
        raise CorpusError(
            f"corpus.token_dtype uint16 holds 65,536 ids, and the vocabulary has {id_space:,}",
            allowed="auto or uint32",
            action="set corpus.token_dtype=auto",
        )


class _TokenFile:
    """Appends token ids to a file; counts and hashes them on the way."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.path = path
        self.tokens = 0
        self.documents = 0
        self._dtype = np.dtype(dtype).newbyteorder("<")
        with storage_errors(path):
            self._file = path.open("wb")

    def append(self, ids: list[int]) -> None:
        with storage_errors(self.path):
            self._file.write(np.asarray(ids, dtype=self._dtype).tobytes())
        self.tokens += len(ids)
        self.documents += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with storage_errors(self.path):
            self._file.close()


def _build(plan: _Plan, staging: Path) -> None:
    """Fill a folder: tokenizer, token files, and the manifest last."""
    # Said outright, `tokenizers` uses its threads and does not warn when the process starts others later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    tokenizer = plan.tokenizer or _trained(plan)
    dtype = plan.corpus.token_dtype
    if dtype == "auto":
        dtype = "uint16" if _id_space(tokenizer) <= 2**16 else "uint32"
    with (
        _TokenFile(staging / "train.bin", dtype) as train,
        _TokenFile(staging / "validation.bin", dtype) as validation,
    ):
        counts = _write_parts(plan.corpus, tokenizer, train, validation)
    _check_parts(plan.corpus, train, validation, sum(count["empty_documents"] for count in counts))
    with storage_errors(staging):
        tokenizer.save_pretrained(staging / "tokenizer")
        manifest = {
            "fingerprint": plan.fingerprint,
            **plan.identity,
            "sources": [
                {"identity": identity, **count}
                for identity, count in zip(plan.identity["sources"], counts, strict=True)
            ],
            "tokenizer": {**plan.identity["tokenizer"], "sha256": tokenizer_sha256(tokenizer)},
            "document_form": _document_form(tokenizer),
            "train_tokens": train.tokens,
            "train_documents": train.documents,
            "validation_tokens": validation.tokens,
            "validation_documents": validation.documents,
            "token_dtype": dtype,
            "vocab_size": _id_space(tokenizer),
            "eos_id": tokenizer.eos_token_id,
            "bos_id": tokenizer.bos_token_id,
            "files": describe_files(staging),
            "versions": {"python": platform.python_version(), "tokenizers": version("tokenizers")},
        }
        write_json(staging / "manifest.json", manifest)


def _trained(plan: _Plan) -> "PreTrainedTokenizerBase":
    wanted = int(plan.identity["tokenizer"]["train"])
    with Meter("training the tokenizer", "documents") as meter:
        return train_tokenizer(_training_texts(plan.corpus, meter), wanted)


def _training_texts(corpus: Corpus, meter: Meter) -> Iterator[str]:
    """Yield the documents that are not held out: a tokenizer must not know the validation part."""
    for source in corpus.sources:
        for text in sources.documents(source):
            if text and not held_out(text, corpus.validation_ratio):
                meter.advance(1)
                yield text


def _write_parts(
    corpus: Corpus, tokenizer: "PreTrainedTokenizerBase", train: _TokenFile, validation: _TokenFile
) -> list[dict[str, int]]:
    """Encode all documents into the two parts; returns the counts of each source."""
    with Meter("tokenizing", "tokens", corpus.max_tokens) as meter:
        return [_write_source(source, corpus, tokenizer, (train, validation), meter) for source in corpus.sources]


def _write_source(
    source: Source,
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerBase",
    parts: tuple[_TokenFile, _TokenFile],
    meter: Meter,
) -> dict[str, int]:
    train, validation = parts
    before = train.tokens, validation.tokens, train.documents, validation.documents
    empty = 0
    wanted = math.inf if corpus.max_tokens is None else corpus.max_tokens
    # A source that comes after the last wanted token is not opened at all.
    texts = sources.documents(source) if train.tokens < wanted else iter(())
    for text, ids in _encode(texts, tokenizer):
        if train.tokens == wanted:
            break
        if not text:
            empty += 1
        elif held_out(text, corpus.validation_ratio):
            validation.append(ids)
        else:
            taken = ids if corpus.max_tokens is None else ids[: corpus.max_tokens - train.tokens]
            train.append(taken)
            meter.advance(len(taken), f"{train.documents + validation.documents:,} documents")
    count = {
        "documents": train.documents - before[2] + validation.documents - before[3],
        "held_out_documents": validation.documents - before[3],
        "empty_documents": empty,
        "train_tokens": train.tokens - before[0],
        "validation_tokens": validation.tokens - before[1],
    }
    if isinstance(source, EmbeddedSource):
        count["unparsed_files"] = embedded.running().unparsed_files
    return count


def _encode(texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase") -> Iterator[tuple[str, list[int]]]:
    """Yield each text with its ids, eos last; encoded in batches of bounded size, on all cores."""
    backend, eos = backend_of(tokenizer), tokenizer.eos_token_id
    # A tokenizer whose template ends a text itself (T5's kind) must not end it twice.
    ends_itself = backend.encode("").ids[-1:] == [eos]
    for batch in _batches(texts):
        for text, encoding in zip(batch, backend.encode_batch_fast(batch, add_special_tokens=True), strict=True):
            yield text, encoding.ids if ends_itself else [*encoding.ids, eos]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _check_parts(corpus: Corpus, train: _TokenFile, validation: _TokenFile, empty: int) -> None:
    documents = train.documents + validation.documents
    if not documents:
        raise CorpusError(
            f"the corpus has no document with text in it ({empty} empty ones were skipped)",
            action="check paths and text_field of corpus.sources",
        )
    if not train.documents:
        raise CorpusError(
            f"the training part is empty: all {documents} documents were held out "
            f"at corpus.validation_ratio={corpus.validation_ratio}",
            action="lower corpus.validation_ratio, or give more documents in corpus.sources",
        )
    if not validation.documents:
        raise CorpusError(
            f"the validation part is empty: none of {documents} documents was held out "
            f"at corpus.validation_ratio={corpus.validation_ratio}",
            action=f"raise corpus.validation_ratio{'' if corpus.max_tokens is None else ' or corpus.max_tokens'}, "
            "or give more documents in corpus.sources (document_separator cuts a .txt file into several)",
        )


def _document_form(tokenizer: "PreTrainedTokenizerBase") -> str:
    names = backend_of(tokenizer).encode("").tokens
    front = [name for name in names if name != tokenizer.eos_token]
    return " ".join([*front, "text", str(tokenizer.eos_token)])
