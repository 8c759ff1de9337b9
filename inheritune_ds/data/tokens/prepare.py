"""Turns documents into token files, once; a fingerprint of all settings and data finds them again.

`cache/tokens/<fingerprint>/` holds a folder per source with its shards (header-free little-endian integers:
`train-00000.bin`, `validation-00000.bin`, ...), `tokenizer/` (a Hugging Face folder) and `manifest.json`. A document is
encoded with the tokenizer's own special tokens (LLaMA's adds <s> in front, GPT-2's nothing) and ends in one end-of-text
token; documents follow each other without padding. A preparation writes to `cache/tokens/.<fingerprint>.partial/`; if
it is killed, the next one resumes there.
"""

import hashlib
import itertools
import logging
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inheritune_ds.config.corpus import Corpus, Source, TokensSource, TrainedTokenizer
from inheritune_ds.console import Meter
from inheritune_ds.data.documents import sources
from inheritune_ds.data.documents.holdout import is_held_out
from inheritune_ds.data.tokens.encoder import TextEncoder
from inheritune_ds.data.tokens.journal import JOURNAL_FILES, Journal, remove_journal
from inheritune_ds.data.tokens.overlap import OverlapIndex
from inheritune_ds.data.tokens.plan import Plan, id_space, tokens_of_removed_text
from inheritune_ds.data.tokens.roundtrip import check_fidelity
from inheritune_ds.data.tokens.shards import SHARD_TOKENS
from inheritune_ds.data.tokens.token_set import TokenSet, find_damage, open_finished
from inheritune_ds.data.tokens.tokenizer import backend_of, load_tokenizer, tokenizer_sha256, train_tokenizer
from inheritune_ds.data.tokens.vocabulary import check_rows
from inheritune_ds.data.tokens.writer import COUNTS, Build
from inheritune_ds.errors import CorpusError
from inheritune_ds.storage.files import remove_leftovers, storage_errors, write_json
from inheritune_ds.storage.folders import describe_files, exclusive, publish, tidy
from inheritune_ds.storage.known_hashes import known_hashes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SAMPLE_DOCUMENTS = 32
"""Documents of every source that check the tokenizer before anything is written."""
TOTALS = ("train_tokens", "train_documents", "validation_tokens", "validation_documents", *COUNTS)
"""Keys of the manifest that are sums over the sources."""


def prepare(  # noqa: PLR0913 - one argument for each setting
    corpus: Corpus,
    tokenizer: str | TrainedTokenizer,
    cache_dir: Path,
    *,
    revision: str = "main",
    workers: int | None = None,
    damage_of: Callable[[TokenSet], str | None] = find_damage,
    shard_tokens: int = SHARD_TOKENS,
    rows: int | None = None,
) -> TokenSet:
    """Return the tokens of a corpus; make them unless they exist.

    `tokenizer` is a hub id (with `revision`), a local folder, or settings for training one. Tokens appear in
    `cache_dir`/tokens, whole or not at all. `workers` processes encode; None uses the cores of this process.
    `damage_of` describes the damage of existing token files with the right sizes; None if they are intact. Local files
    of the corpus need not be there any more once they are tokenized. `rows` are the entries of the model's vocabulary;
    None does not compare them with the tokenizer's ids.

    Raises:
        CorpusError: A corpus file is missing or damaged, a part is empty, or ids exceed `token_dtype` or `rows`.
        HubError: The hub is needed and cannot be reached.
        StorageError: The cache cannot be written.
    """
    if rows is not None and isinstance(tokenizer, str):
        check_rows(load_tokenizer(tokenizer, revision), rows)
    found = tokens_of_removed_text(corpus, tokenizer, cache_dir, revision, shard_tokens)
    if found is not None and damage_of(found) is None:
        return found
    with known_hashes(cache_dir) as hashes:
        plan = Plan.of(corpus, tokenizer, revision, shard_tokens, hashes)
    folder = cache_dir / "tokens" / plan.fingerprint
    found, damage = _finished(plan, folder, damage_of)
    partial = folder.with_name(f".{folder.name}.partial")
    if found is not None:
        tidy(partial)
        if rows is not None and plan.tokenizer is None:
            check_rows(load_tokenizer(str(found.tokenizer_dir)), rows)
        return found
    if damage:
        logger.warning("the tokens in %s are damaged; they are remade from the corpus: %s", folder, damage)
    with exclusive(partial):
        found, _ = _finished(plan, folder, damage_of)  # another process may have made them meanwhile
        if found is None:
            _fill(plan, partial, workers or len(os.sched_getaffinity(0)), rows)
            with storage_errors(folder):
                publish(partial, folder)
            found = open_finished(folder, plan.fingerprint)
            assert found is not None  # just published
    return found


def _finished(
    plan: Plan, folder: Path, damage_of: Callable[[TokenSet], str | None]
) -> tuple[TokenSet | None, str | None]:
    """The existing intact tokens, and the damage of existing ones."""
    found = open_finished(folder, plan.fingerprint)
    damage = damage_of(found) if found else "a file is missing or has another size" if folder.exists() else None
    return None if damage else found, damage


def _fill(plan: Plan, partial: Path, workers: int, rows: int | None) -> None:
    """Complete the folder: tokenizer, shards, and the manifest last."""
    if open_finished(partial, plan.fingerprint) is not None:  # killed between the manifest and the rename
        remove_journal(partial)
        return
    journal = Journal(partial)
    try:
        tokenizer = _tokenizer(plan, partial, is_new=journal.state() is None)
        definition = backend_of(tokenizer).to_str(), tokenizer.eos_token_id
        ids = id_space(tokenizer)
        if rows is not None and plan.tokenizer is None:  # trained here
            check_rows(tokenizer, rows)
        dtype = plan.corpus.token_dtype
        if dtype == "auto":
            dtype = "uint16" if ids <= 2**16 else "uint32"
        encoder = TextEncoder(*definition)
        fidelity = _check_tokenizer(plan, encoder)
        build = Build(
            plan.corpus,
            partial,
            dtype=dtype,
            id_space=ids,
            shard_tokens=plan.shard_tokens,
            encoder=encoder,
            definition=definition,
            journal=journal,
            workers=workers,
            index=_overlap_index(plan.corpus),
            check_files=plan.check_files,
        )
        counts = build.run()
        _check_parts(plan.corpus, counts)
    finally:
        journal.close()
    remove_leftovers(partial)
    with storage_errors(partial):
        manifest = {
            "fingerprint": plan.fingerprint,
            **plan.identity,
            "sources": [
                {**count, "left_out_files": sources.skipped_files(source), "identity": identity}
                for source, identity, count in zip(plan.corpus.sources, plan.identity["sources"], counts, strict=True)
            ],
            "tokenizer": {**plan.identity["tokenizer"], "sha256": tokenizer_sha256(tokenizer)},
            "document_form": _document_form(tokenizer, encoder),
            **{key: sum(count[key] for count in counts) for key in TOTALS},
            "token_dtype": dtype,
            "vocab_size": ids,
            "eos_id": tokenizer.eos_token_id,
            "bos_id": tokenizer.bos_token_id,
            "fidelity": fidelity,
            "overlap": build.overlap.as_dict() if build.overlap is not None else None,
            "files": describe_files(partial, ignored=JOURNAL_FILES),
            "versions": {"python": platform.python_version(), "tokenizers": version("tokenizers")},
        }
        write_json(partial / "manifest.json", manifest)
    remove_journal(partial)  # last: until here, a killed preparation resumes from finished shards


def _tokenizer(plan: Plan, partial: Path, *, is_new: bool) -> "PreTrainedTokenizerBase":
    """The tokenizer, saved in the folder before the first document is written."""
    folder = partial / "tokenizer"
    if is_new:
        with storage_errors(partial):
            shutil.rmtree(folder, ignore_errors=True)
            (plan.tokenizer or _trained(plan)).save_pretrained(folder)
    return plan.tokenizer or load_tokenizer(str(folder))


def _trained(plan: Plan) -> "PreTrainedTokenizerBase":
    # If this is set, `tokenizers` uses its threads and does not warn when the process starts others later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    wanted = int(plan.identity["tokenizer"]["train"])
    with Meter("training the tokenizer", "documents") as meter:
        return train_tokenizer(_training_texts(plan.corpus, meter), wanted)


def _training_texts(corpus: Corpus, meter: Meter) -> Iterator[str]:
    """Yield the training documents; the tokenizer must not see the validation part.

    Limits in documents apply, limits in tokens do not: there are no tokens yet.
    """
    for source in corpus.sources:
        for text in _texts(source):
            if not is_held_out(hashlib.sha256(text.encode()).digest(), corpus.validation_ratio):
                meter.advance(1)
                yield text


def _texts(source: Source) -> Iterator[str]:
    if isinstance(source, TokensSource):
        return iter(())
    texts = (document.text for document in sources.documents(source) if document.text)
    return itertools.islice(texts, source.max_documents)


def _check_tokenizer(plan: Plan, encoder: TextEncoder) -> dict[str, Any]:
    """Check the tokenizer on the first documents of every source; returns its entry in the manifest."""
    sample = (text for source in plan.corpus.sources for text in itertools.islice(_texts(source), SAMPLE_DOCUMENTS))
    found = check_fidelity(encoder, sample, plan.sentencepiece)
    if found.warning:
        logger.warning(found.warning)
    return asdict(found)


def _overlap_index(corpus: Corpus) -> OverlapIndex | None:
    if not corpus.overlap_with:
        return None
    without_text = [source.name for source in corpus.sources if isinstance(source, TokensSource)]
    if without_text:
        logger.warning("overlap is not checked in %s: token files hold no text", ", ".join(without_text))
    return OverlapIndex.build({source.name: _texts(source) for source in corpus.overlap_with}, corpus.overlap_ngram)


def _check_parts(corpus: Corpus, counts: list[dict[str, Any]]) -> None:
    train, validation = (sum(count[f"{part}_documents"] for count in counts) for part in ("train", "validation"))
    skipped = sum(count[key] for count in counts for key in ("empty_documents", "filtered_documents", "bad_records"))
    if not train + validation:
        raise CorpusError(
            f"the corpus has no document with text ({skipped} empty, filtered or bad ones were skipped)",
            action="check paths, text_field and filters of corpus.sources",
        )
    if not train:
        raise CorpusError(
            f"the training part is empty: all {validation} documents were held out "
            f"at corpus.validation_ratio={corpus.validation_ratio}",
            action="lower corpus.validation_ratio, or add documents to corpus.sources",
        )
    if not validation:
        raise CorpusError(
            f"the validation part is empty: none of {train} documents was held out "
            f"at corpus.validation_ratio={corpus.validation_ratio}",
            action=f"raise corpus.validation_ratio{'' if corpus.max_tokens is None else ' or corpus.max_tokens'}, "
            "or add documents to corpus.sources (document_separator splits a .txt file into several)",
        )
    empty = [count["name"] for count in counts if not count["train_tokens"]]
    if corpus.weights is not None and empty:
        raise CorpusError(
            f"source {empty[0]} has a weight but no training tokens",
            action="remove it from corpus.sources, or check its paths, filters and limits",
        )


def _document_form(tokenizer: "PreTrainedTokenizerBase", encoder: TextEncoder) -> str:
    front, back = (
        [str(tokenizer.convert_ids_to_tokens(number)) for number in ids] for ids in (encoder.front, encoder.back)
    )
    return " ".join([*front, "text", *back, str(tokenizer.eos_token)])
