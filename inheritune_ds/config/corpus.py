"""The corpus of a recipe: sources, their weights, the tokenizer and the held-out part."""

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    Tag,
    field_validator,
    model_validator,
)

from inheritune_ds.config.fields import NAME_FORM, ConfigModel, Name, Text, TokenCount

Weight = Annotated[float, Field(ge=0.0)]
Scalar = str | int | float | bool | None

MAX_ROUND_WINDOWS = 10_000
"""Longest pattern in which the sources of a mixture may take turns, in windows."""
OTHER_NAMES = ("tokenizer", "manifest.json", "progress.sqlite", "progress.sqlite-journal")
"""Names in a token folder that no source can have."""


class Filters(ConfigModel):
    """Which records are taken; the others are counted and skipped."""

    keep: dict[Text, list[Scalar]] = Field(default={})
    """Field (dots lead into nested ones) -> values of which the record must have one."""
    drop: dict[Text, list[Scalar]] = Field(default={})
    """Field -> values of which the record must have none."""
    min_characters: Annotated[int, Field(ge=0)] = 0
    """Shorter documents are skipped."""
    max_characters: PositiveInt | None = None
    """Longer documents are skipped."""

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ValueError(
                f"min_characters {self.min_characters} is more than max_characters {self.max_characters}: "
                "no document would pass"
            )
        return self


class _AnySource(ConfigModel):
    """Keys of every source."""

    name: Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$"), NAME_FORM] = ""
    """In metrics and file names; the default is made from the kind, dataset or path."""
    weight: Weight | None = None
    """Share of the windows, relative to the other sources; all sources have one, or none."""
    max_documents: PositiveInt | None = None
    """Stop after this many documents, held-out ones included."""
    max_tokens: PositiveInt | None = None
    """Stop after this many training tokens of this source."""


class EmbeddedSource(_AnySource):
    """The running Python's own documentation: about 2 MB of English on every machine."""

    kind: Literal["embedded"]


class FilesSource(_AnySource):
    """Local files: .txt, .jsonl and .json (also .gz, .bz2, .zst), .parquet, .arrow."""

    kind: Literal["files"]
    paths: Annotated[list[Text], Field(min_length=1)]
    """Files, folders or glob patterns, relative to the current folder; the matches of each are sorted."""
    text_field: Text = "text"
    """Field of a record that holds the document; dots lead into nested ones."""
    document_separator: Text | None = None
    """Splits a .txt file into documents; without it the whole file is one document."""
    filters: Filters = Filters()
    bad_records: Literal["refuse", "skip"] = "refuse"
    """Handling of a record that is not a JSON object or has no text in its field; skipped ones are counted."""


class HubSource(_AnySource):
    """A dataset of the Hugging Face hub, by file pattern; loading scripts are never run."""

    kind: Literal["hub"]
    dataset: Text
    data_files: Text
    """Pattern inside the dataset repository, such as `data/*.parquet`."""
    revision: Text = "main"
    """A commit, tag or branch; resolved to a full commit and pinned in the token manifest."""
    split: Text | None = None
    """Take only the files with this split in their path (`train`, `validation`, `test`); default: all files."""
    text_field: Text = "text"
    streaming: bool = True
    """Read while downloading, nothing kept; false downloads all of it into the hub's cache first."""
    filters: Filters = Filters()
    bad_records: Literal["refuse", "skip"] = "refuse"
    """Handling of a record that has no text in its field; skipped ones are counted."""
    download_gib: PositiveFloat | None = None
    """Size of the files to download, for the budget."""
    published_tokens: PositiveInt | None = None
    """Tokens of the files by their publisher's count, for the budget before the corpus is tokenized."""


class TokensSource(_AnySource):
    """Token files as nanoGPT writes them: headerless uint16, an end-of-text token after every document."""

    kind: Literal["nanogpt"]
    train: Text
    """`train.bin`; its tokens must be those of `corpus.tokenizer`."""
    validation: Text | None = None
    """`val.bin`, read completely: limits apply to `train`. Without it, documents of `train` are held out by their
    hash."""


Source = Annotated[EmbeddedSource | FilesSource | HubSource | TokensSource, Field(discriminator="kind")]
TextSource = EmbeddedSource | FilesSource | HubSource
EvaluationSet = Annotated[FilesSource | HubSource, Field(discriminator="kind")]


class TrainedTokenizer(ConfigModel):
    """A byte-level BPE trained on the corpus itself."""

    vocab_size: Annotated[int, Field(ge=257)]
    """Entries, including the end-of-text token and the 256 bytes."""


class WeightChange(ConfigModel):
    """New weights from a point of the run on."""

    at: TokenCount
    """Tokens seen, such as `500M tokens` (or K or B); it takes effect with the first round that begins after it."""
    weights: Annotated[dict[Name, Weight], Field(min_length=1)]
    """Name of a source -> weight, for every source."""

    @property
    def tokens(self) -> int:
        """`at` as a number."""
        return self.at.amount

    @field_validator("weights")
    @classmethod
    def _check_shares(cls, weights: dict[str, float]) -> dict[str, float]:
        shares(list(weights.values()))
        return weights


class Corpus(ConfigModel):
    """The documents, their tokenizer and the held-out part."""

    sources: Annotated[list[Source], Field(min_length=1)]
    weight_changes: list[WeightChange] = Field(default=[])
    """Later weights, in the order of their `at`."""
    tokenizer: (
        Annotated[
            Annotated[Text, Tag("text")] | Annotated[TrainedTokenizer, Tag("mapping")],
            Discriminator(lambda value: "mapping" if isinstance(value, dict | TrainedTokenizer) else "text"),
        ]
        | None
    ) = None
    """Hub id or local folder, or `{vocab_size: n}` to train one; default: the reference's."""
    max_tokens: PositiveInt | None = None
    """Stop after this many training tokens: shared by weight, or without weights in the order of the sources."""
    validation_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01
    """Share of the documents that is held out, chosen by the hash of their text."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Handling of exact copies of an earlier document; they are counted either way."""
    overlap_with: list[EvaluationSet] = Field(default=[])
    """Evaluation sets; training documents that share an n-gram of words with one are counted."""
    overlap_ngram: Annotated[int, Field(ge=3)] = 13
    """Words of such an n-gram."""
    token_dtype: Literal["auto", "uint16", "uint32"] = "auto"  # noqa: S105 - no password
    """Integer type of the token files; `auto` is the smallest that the vocabulary fits."""

    @property
    def weights(self) -> list[float] | None:
        """Weights of the sources at the start; None without weights."""
        weights = [source.weight for source in self.sources if source.weight is not None]
        return weights or None

    @property
    def token_limits(self) -> list[int | None]:
        """Most training tokens of every source: its own limit and, with weights, its share of `max_tokens`."""
        if self.weights is None or self.max_tokens is None:
            return [source.max_tokens for source in self.sources]
        turns = shares(self.weights)
        limits = [self.max_tokens * turn // sum(turns) for turn in turns]
        return [min(limit, source.max_tokens or limit) for limit, source in zip(limits, self.sources, strict=True)]

    @field_validator("sources", "overlap_with")
    @classmethod
    def _fill_in_names(cls, sources: list[Any]) -> list[Any]:
        """Give sources without a name their default one, numbered where it is taken."""
        taken = {source.name for source in sources}
        named = []
        for source in sources:
            name, number = source.name, 1
            while not name or (not source.name and name in taken):
                name = _default_name(source) + (f"-{number}" if number > 1 else "")
                number += 1
            taken.add(name)
            named.append(source.model_copy(update={"name": name}))
        return named

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [source.name for source in self.sources]
        duplicates = sorted({name for name in names if names.count(name) > 1})
        if duplicates:
            raise ValueError(f"two sources have the name {duplicates[0]!r}: give each a name of its own")
        taken = next((name for name in names if name in OTHER_NAMES), None)
        if taken is not None:
            raise ValueError(f"a source cannot have the name {taken!r}: the token folder uses it")
        self._check_weights()
        self._check_changes(set(names))
        self._check_evaluation_sets()
        return self

    def _check_weights(self) -> None:
        missing = next((source.name for source in self.sources if source.weight is None), None)
        if self.weights is not None and missing is not None:
            raise ValueError(f"source {missing!r} has no weight and others have: give all of them one, or none")
        if self.weights is not None:
            shares(self.weights)
        if 0 in self.token_limits:
            source = self.sources[self.token_limits.index(0)]
            raise ValueError(
                f"source {source.name!r} with weight {source.weight:g} at the start gets no tokens of max_tokens: "
                "give every source its own max_tokens instead, or remove the source"
            )

    def _check_changes(self, names: set[str]) -> None:
        if self.weight_changes and self.weights is None:
            raise ValueError("weight_changes needs sources with weights")
        marks = [change.tokens for change in self.weight_changes]
        if marks != sorted(set(marks)):
            raise ValueError("weight_changes must be sorted by `at`, each later than the one before")
        for change in self.weight_changes:
            if set(change.weights) != names:
                raise ValueError(
                    f"weight_changes at {change.at} must name every source once: {', '.join(sorted(names))}"
                )

    def _check_evaluation_sets(self) -> None:
        names = [source.name for source in self.overlap_with]
        if len(set(names)) < len(names):
            raise ValueError("two sets of overlap_with have the same name: give each a name of its own")
        if any(source.weight is not None for source in self.overlap_with):
            raise ValueError("a set of overlap_with is not trained on: remove its weight")
        if any(source.max_tokens is not None for source in self.overlap_with):
            raise ValueError("a set of overlap_with is not tokenized: limit it with max_documents")


def shares(weights: Sequence[float]) -> list[int]:
    """Return the turns of each source in a round: the smallest integers in the proportion of the weights.

    A weight counts as written: 0.045 is 45/1000, not the float nearest to it.

    Raises:
        ValueError: All are 0, or a round would have more than `MAX_ROUND_WINDOWS` turns.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    if not any(exact):
        raise ValueError("all weights are 0: at least one must be above 0")
    unit = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * unit) for weight in exact]
    turns = [weight // math.gcd(*whole) for weight in whole]
    if sum(turns) > MAX_ROUND_WINDOWS:
        raise ValueError(
            f"weights {', '.join(str(weight) for weight in weights)} repeat only after {sum(turns):,} windows, "
            f"and at most {MAX_ROUND_WINDOWS:,} are allowed: write them as small integers or with fewer digits"
        )
    return turns


def _default_name(source: Source) -> str:
    """The file or its folder, the dataset without its owner, the folder of token files, or the kind."""
    name = ""
    match source:
        case FilesSource(paths=[first, *_]):
            stem = PurePath(first).name.split(".")[0]
            name = stem if re.search("[A-Za-z0-9]", stem) else PurePath(first).parent.name
        case HubSource():
            name = PurePath(source.dataset).name
        case TokensSource():
            name = PurePath(source.train).parent.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or source.kind
