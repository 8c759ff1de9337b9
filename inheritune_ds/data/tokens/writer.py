"""Turns the documents of a corpus into shards: reads, encodes in several processes, writes in order.

All counts are made when a document is written, in the order of the documents, and saved in the journal together with
the position of the next one. The result depends neither on the number of processes nor on kills.
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing as npt

from inheritune_ds.config.corpus import Corpus, EmbeddedSource, Source, TextSource, TokensSource
from inheritune_ds.console import Meter
from inheritune_ds.data.documents import nanogpt_documents, python_docs, sources
from inheritune_ds.data.documents.holdout import is_held_out
from inheritune_ds.data.documents.records import Cursor, Document
from inheritune_ds.data.tokens.encoder import TextEncoder
from inheritune_ds.data.tokens.journal import Journal
from inheritune_ds.data.tokens.overlap import OverlapCounter, OverlapIndex
from inheritune_ds.data.tokens.shards import ShardWriter
from inheritune_ds.data.tokens.workers import EncoderPool
from inheritune_ds.errors import InherituneError

JOB_CHARACTERS = 2**20
JOB_PIECES = 512
JOB_RECORDS = 2**13
"""A job is submitted after at most this many records, so that skipped ones do not pile up before it."""
COMMIT_INTERVAL_S = 30.0
"""The journal is written after every shard, and after this time."""

COUNTS = ("empty_documents", "filtered_documents", "bad_records", "duplicate_documents", "forced_cuts")
_SKIPPED = {"empty": "empty_documents", "filtered": "filtered_documents", "bad": "bad_records"}


class _Item(NamedTuple):
    """A document without its ids."""

    document: Document
    digest: bytes
    held_out: bool
    pieces: int
    forced_cuts: int
    hits: Any


class _SourceState:
    """Everything written of a source and the position of its next document, restored from its last `as_dict`."""

    def __init__(self, source: Source, build: "Build", kept: Mapping[str, Any], limit: int | None) -> None:
        self.name, self.limit, self._max_documents = source.name, limit, source.max_documents
        self.cursor = Cursor(*kept.get("cursor", ()))
        self.counts: dict[str, int] = kept.get("counts", dict.fromkeys(COUNTS, 0))
        self.first_bad: str = kept.get("first_bad_record", "")
        own = build.folder / source.name
        self.train, self.validation = (
            ShardWriter(own, part, build.dtype, kept.get(part, ()), build.shard_tokens)
            for part in ("train", "validation")
        )

    @property
    def documents(self) -> int:
        """Documents written."""
        return self.train.documents + self.validation.documents

    @property
    def wants_more(self) -> bool:
        """Whether no limit is reached."""
        enough = self.limit is not None and self.train.tokens >= self.limit
        return not enough and (self._max_documents is None or self.documents < self._max_documents)

    def as_dict(self) -> dict[str, Any]:
        """Flush the shards and return the state, for the journal and the manifest."""
        return {
            "name": self.name,
            "cursor": list(self.cursor),
            "documents": self.documents,
            "train_documents": self.train.documents,
            "validation_documents": self.validation.documents,
            "train_tokens": self.train.tokens,
            "validation_tokens": self.validation.tokens,
            "counts": dict(self.counts),
            "first_bad_record": self.first_bad,
            "train": self.train.state(),
            "validation": self.validation.state(),
        }

    def abandon(self) -> None:
        """Close the files without completing them; the next attempt resumes from the journal."""
        self.train.abandon()
        self.validation.abandon()

    def close(self) -> dict[str, Any]:
        """Complete the files; returns the source's entry in the manifest."""
        self.train.close()
        self.validation.close()
        state = self.as_dict()
        del state["cursor"]
        counts = state.pop("counts")
        return {**state, **counts}


@dataclass
class Build:
    """Fills a folder with shards.

    `check_files` raises if a corpus file is not the one in the fingerprint. It is called before every commit: otherwise
    a resumed preparation would keep text from a changed file.
    """

    corpus: Corpus
    folder: Path
    dtype: str
    id_space: int
    shard_tokens: int
    encoder: TextEncoder
    definition: tuple[str, int]
    journal: Journal
    workers: int
    index: OverlapIndex | None
    check_files: Callable[[], None]

    def __post_init__(self) -> None:
        kept = self.journal.state() or {}
        self._finished: list[dict[str, Any]] = kept.get("finished", [])
        self._kept: dict[str, Any] = kept.get("current", {})
        self.overlap = OverlapCounter(self.index, kept.get("overlap")) if self.index is not None else None
        self._bytes = 0
        self._committed_s = time.monotonic()

    def run(self) -> list[dict[str, Any]]:
        """Write every source; returns the manifest's entry of each."""
        sizes = [
            None if isinstance(source, TokensSource) else sources.total_bytes(source) for source in self.corpus.sources
        ]
        self._total = None if None in sizes else sum(size or 0 for size in sizes)
        with (
            Meter("tokenizing", "tokens", self.corpus.max_tokens) as self._meter,
            EncoderPool(self.encoder, self.definition, self.workers) as self._pool,
        ):
            for number, source in enumerate(self.corpus.sources):
                if number >= len(self._finished):
                    self._finished.append(self._write(source, number))
                    self._kept = {}
                    self._commit()
                self._bytes = sum(size or 0 for size in sizes[: number + 1])
        return self._finished

    def _write(self, source: Source, number: int) -> dict[str, Any]:
        self._now = _SourceState(source, self, self._kept, self._limit(number))
        try:
            if isinstance(source, TokensSource):
                self._copy(source)
            elif self._now.wants_more:
                self._encode(source)
            entry = self._now.close()
        except BaseException:
            self._now.abandon()
            raise
        if isinstance(source, EmbeddedSource):
            entry["unparsed_files"] = python_docs.running().unparsed_files
        return entry

    def _limit(self, number: int) -> int | None:
        """Most training tokens of a source: its own limit, and the remainder of the corpus's limit."""
        own = self.corpus.token_limits[number]
        if self.corpus.max_tokens is None or self.corpus.weights is not None:
            return own
        left: int = self.corpus.max_tokens - sum(source["train_tokens"] for source in self._finished)
        return left if own is None else min(own, left)

    def _read(self, count: int) -> None:
        self._bytes += count

    def _copy(self, source: TokensSource) -> None:
        state = self._now
        for document in nanogpt_documents.documents(
            source,
            state.cursor,
            eos_id=self.encoder.eos_id,
            id_space=self.id_space,
            ratio=self.corpus.validation_ratio,
            wants_more=lambda: state.wants_more,
        ):
            state.cursor = document.cursor
            closed = self._is_wanted(document.digest) and self._put(document.ids, held_out=document.held_out)
            self._keep(at_once=closed)

    def _encode(self, source: TextSource) -> None:
        for item, ids in self._encoded(source):
            self._keep(at_once=self._take(item, ids))
            if not self._now.wants_more:
                return

    def _encoded(self, source: TextSource) -> Iterator[tuple[_Item, npt.NDArray[Any]]]:
        """Yield documents with their ids, in order; a reader's error is raised after the documents before it.

        So a limit before a bad record is reached, however far the processes have read ahead.
        """
        waiting: deque[_Item] = deque()
        parts: deque[npt.NDArray[Any]] = deque()
        failed: list[InherituneError] = []
        documents = _until_error(sources.documents(source, self._now.cursor, self._read), failed)
        for found in self._pool.encode(self._jobs(documents, waiting)):
            parts.extend(found)
            while waiting and waiting[0].pieces <= len(parts):
                item = waiting.popleft()
                yield item, self.encoder.document([parts.popleft() for _ in range(item.pieces)])
        for error in failed:
            raise error

    def _jobs(self, documents: Iterator[Document], waiting: deque[_Item]) -> Iterator[list[str]]:
        """Yield the pieces of the documents in lists of bounded size; the documents are appended to `waiting`."""
        job: list[str] = []
        characters = records = 0
        for document in documents:
            forced_before = self.encoder.forced_cuts
            pieces = self.encoder.pieces(document.text) if document.text else []
            waiting.append(self._examine(document, len(pieces), self.encoder.forced_cuts - forced_before))
            records += 1
            for piece in pieces:
                job.append(piece)
                characters += len(piece)
                if characters >= JOB_CHARACTERS or len(job) == JOB_PIECES:
                    yield job
                    job, characters, records = [], 0, 0
            if records == JOB_RECORDS:
                yield job
                job, characters, records = [], 0, 0
        yield job

    def _examine(self, document: Document, pieces: int, forced_cuts: int) -> _Item:
        text = document.text
        digest = hashlib.sha256(text.encode()).digest() if text else b""
        held = bool(text) and is_held_out(digest, self.corpus.validation_ratio)
        hits = self.index.find(text) if self.index is not None and text and not held else None
        return _Item(document, digest, held, pieces, forced_cuts, hits)

    def _take(self, item: _Item, ids: npt.NDArray[Any]) -> bool:
        """Count a document and write it unless it is skipped; returns whether this closed a shard."""
        state, document = self._now, item.document
        state.cursor = document.cursor
        if document.skipped:
            state.counts[_SKIPPED[document.skipped]] += 1
            state.first_bad = state.first_bad or document.note
        elif self._is_wanted(item.digest):
            state.counts["forced_cuts"] += item.forced_cuts
            if item.hits is not None and self.overlap is not None:
                self.overlap.add(item.hits)
            return self._put(ids, held_out=item.held_out)
        return False

    def _is_wanted(self, digest: bytes) -> bool:
        if self.journal.is_new(digest):
            return True
        self._now.counts["duplicate_documents"] += 1
        return self.corpus.duplicates == "keep"

    def _put(self, ids: npt.NDArray[Any], *, held_out: bool) -> bool:
        """Write a document; returns whether this closed a shard."""
        state = self._now
        if held_out:
            return state.validation.append(ids)
        taken = ids if state.limit is None else ids[: state.limit - state.train.tokens]
        closed = state.train.append(taken)
        share = self._bytes / self._total if self._total else None
        self._meter.advance(len(taken), f"{state.documents:,} documents of {state.name}", share)
        return closed

    def _keep(self, *, at_once: bool) -> None:
        """Commit the position behind a document if it is time; skipped documents take time too."""
        if at_once or time.monotonic() - self._committed_s > COMMIT_INTERVAL_S:
            self._kept = self._now.as_dict()
            self._commit()

    def _commit(self) -> None:
        self.check_files()
        overlap = self.overlap.state() if self.overlap is not None else None
        self.journal.commit({"finished": self._finished, "current": self._kept, "overlap": overlap})
        self._committed_s = time.monotonic()


def _until_error(documents: Iterator[Document], failed: list[InherituneError]) -> Iterator[Document]:
    """Yield documents until an error, which is appended to `failed`."""
    try:
        yield from documents
    except InherituneError as error:
        failed.append(error)
