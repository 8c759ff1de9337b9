"""Compare models on the same validation windows: paired differences by document, over seeds if there are enough."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from inheritune_ds.data.window_losses import Estimate, Floats, Spread, estimate
from inheritune_ds.errors import RunFolderError
from inheritune_ds.report.results import Evaluation

MIN_SEEDS = 3
"""With fewer runs of an arm, the spread between seeds is not estimated."""
MIN_EFFECTIVE_DOCUMENTS = 15.0
"""With fewer, an interval is rough, and no order is stated."""


@dataclass(frozen=True)
class Arm:
    """A model to compare: the runs of one recipe that differ in the seed alone."""

    label: str
    precision: str
    evaluations: tuple[Evaluation, ...]
    """Of each run."""
    given: bool = False
    """The reference is one given model, whatever its seed was."""

    @property
    def knows_seeds(self) -> bool:
        """Whether the spread between its seeds is known, or is no question."""
        return self.given or len(self.evaluations) >= MIN_SEEDS

    @property
    def tokens(self) -> Floats:
        """Counted targets of each document (D,)."""
        return self.evaluations[0].pieces.document_tokens

    @property
    def losses(self) -> Floats:
        """Loss sum of each document (D,), averaged over the runs."""
        losses: Floats = np.mean([found.pieces.document_losses for found in self.evaluations], axis=0)
        return losses

    @property
    def seeds(self) -> tuple[Spread, ...]:
        """What the spread between seeds adds to the variance of the mean over the runs."""
        count = len(self.evaluations)
        if self.given or count < MIN_SEEDS:
            return ()
        variance = float(np.var([found.loss for found in self.evaluations], ddof=1))
        return (Spread(variance / count, count - 1.0),)

    def estimate(self) -> Estimate:
        """Its mean loss, over documents and, if known, seeds."""
        return estimate(self.losses, self.tokens, self.seeds)


@dataclass(frozen=True)
class Difference:
    """A paired comparison of two arms on the same documents."""

    of: str
    to: str
    found: Estimate
    """Of loss(of) - loss(to), nats per token; negative: `of` is better."""
    over_seeds: bool
    """Whether the interval contains the spread between seeds."""
    words: str


def paired_difference(of: Arm, to: Arm) -> Difference:
    """Compare two arms document by document; raises the error of `check_comparable`."""
    check_comparable([of, to])
    over_seeds = of.knows_seeds and to.knows_seeds
    found = estimate(of.losses - to.losses, of.tokens, (*of.seeds, *to.seeds) if over_seeds else ())
    return Difference(of.label, to.label, found, over_seeds, _in_words(found, over_seeds=over_seeds))


def check_comparable(arms: Sequence[Arm]) -> None:
    """Raise a RunFolderError that names the first difference in windows, tokens, documents or precision."""
    evaluations = [(arm, found) for arm in arms for found in arm.evaluations]
    first, found = evaluations[0]
    for other, against in evaluations[1:]:
        facts = [(f"in {one.precision}", *_facts(on)) for one, on in ((first, found), (other, against))]
        differing = next(((one, two) for one, two in zip(*facts, strict=True) if one != two), None)
        if differing is not None:
            raise RunFolderError(
                f"{first.label} was validated {differing[0]} and {other.label} {differing[1]}: they cannot be compared",
                allowed="one precision and the same validation windows: one corpus, tokenizer, "
                "corpus.validation_ratio, corpus.max_tokens, training.seq_len, training.packing and "
                "validation.max_tokens for both",
                action="make these equal in the DeepSpeed configs and recipes, and train one of the two again under a "
                "new name",
            )


def _facts(found: Evaluation) -> tuple[str, ...]:
    pieces = found.pieces
    return (
        f"on {found.windows} windows",
        f"on windows of {found.seq_len} tokens",
        f"on the text {found.tokens_sha256[:12]}",
        f"on {sum(pieces.tokens):,} targets of {max(pieces.documents) + 1:,} documents",
    )


def _in_words(found: Estimate, *, over_seeds: bool) -> str:
    if found.interval is None:
        return "no interval: fewer than 2 effective documents"
    if not over_seeds:
        return "on this text; the spread between seeds is not in it"
    if found.effective_documents < MIN_EFFECTIVE_DOCUMENTS:
        return "too few effective documents to state an order"
    low, high = found.interval
    if low <= 0.0 <= high:
        return "no clear difference: the interval includes 0"
    return f"{'below' if high < 0.0 else 'above'}, over seeds and documents"
