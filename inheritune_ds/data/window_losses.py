"""Losses of documents in the validation windows: their mean, its standard error and 95 % interval.

Tokens of one document are not independent, so the documents are the sample. D documents, K pieces: a piece is the part
of a document in a window.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESULT_FORMAT = 2
"""Of the files in `eval/`: loss sum and token count by window and document. Format 1 had mean losses of windows."""
Floats = npt.NDArray[np.float64]
_COVERAGE = 0.95
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


@dataclass(frozen=True)
class Estimate:
    """A mean loss, or a mean difference of losses, in nats per token."""

    mean: float
    stderr: float | None
    """None below two effective documents."""
    interval: tuple[float, float] | None
    """95 % interval; None below two effective documents."""
    documents: int
    effective_documents: float
    """1 / sum(w^2) of the documents' shares w of the tokens (Kish 1965): so many equally long ones vary as much."""


@dataclass(frozen=True)
class Spread:
    """A variance and its degrees of freedom."""

    variance: float
    dof: float


@dataclass(frozen=True)
class Pieces:
    """The pieces of the validation windows, window by window; each field (K,)."""

    windows: tuple[int, ...]
    """Number of the window."""
    documents: tuple[int, ...]
    """Number of the document, 0 to D - 1."""
    tokens: tuple[int, ...]
    """Counted targets."""
    losses: tuple[float, ...]
    """Sum of their losses, nats."""

    @property
    def document_tokens(self) -> Floats:
        """Counted targets of each document (D,)."""
        return np.bincount(self.documents, self.tokens).astype(np.float64)

    @property
    def document_losses(self) -> Floats:
        """Sum of the losses of each document (D,), nats."""
        return np.bincount(self.documents, self.losses).astype(np.float64)

    def estimate(self) -> Estimate:
        """Their mean loss, over documents."""
        return estimate(self.document_losses, self.document_tokens)


def estimate(losses: Floats, tokens: Floats, seeds: Sequence[Spread] = ()) -> Estimate:
    """Estimate the mean over tokens as a ratio of two sums over documents, clustered by document.

    With r = sum(L) / sum(n), shares w = n / sum(n) and residuals e = (L - r n) / sum(n), the squared standard error is
    sum(e^2 / (1 - w)). For documents of equal length that is Cochran's D / (D - 1) sum(e^2) (Sampling Techniques, 3rd
    edition, 6.4); the factor by document is Bell and McCaffrey's CR2 (Survey Methodology 28, 2002), since the residual
    of a document of share w is too small by about 1 - w. The interval is Student's, with Satterthwaite's degrees of
    freedom from n_eff - 1 and those of the seeds (docs/decisions/0019-intervals-over-documents.md).

    Args:
        losses: Sum of the losses of each document (D,), or of their differences.
        tokens: Counted targets of each document (D,), not all 0.
        seeds: Variances that the spread between seeds adds to the mean.
    """
    shares, mean = tokens / tokens.sum(), float(losses.sum() / tokens.sum())
    effective, documents = float(1.0 / (shares**2).sum()), int(np.count_nonzero(tokens))
    if effective < 2.0:
        return Estimate(mean, None, None, documents, effective)
    residuals = losses / tokens.sum() - mean * shares
    spreads = [Spread(float((residuals**2 / (1.0 - shares)).sum()), effective - 1.0), *seeds]
    stderr = math.sqrt(sum(spread.variance for spread in spreads))
    half = stderr * _quantile(spreads) if stderr else 0.0
    return Estimate(mean, stderr, (mean - half, mean + half), documents, effective)


def _quantile(spreads: Sequence[Spread]) -> float:
    """Student's quantile for the sum of independent variances (Satterthwaite, Biometrics Bulletin 2, 1946)."""
    total = sum(spread.variance for spread in spreads)
    # Over the total first: variances of equal runs are tiny, and their squares would underflow.
    return student_t(1.0 / sum((spread.variance / total) ** 2 / spread.dof for spread in spreads))


def student_t(dof: float) -> float:
    """Half the width of the central 95 % of Student's distribution with `dof` >= 1 degrees of freedom."""
    low, high = 1.9, 13.0  # the normal distribution's is 1.96, that of one degree of freedom 12.71
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, dof) < _COVERAGE else (low, middle)
    return low


def _within(t: float, dof: float) -> float:
    """P(|T| < t): the density is that of cos^(dof - 1) of the angle atan(t / sqrt(dof))."""
    angle = math.atan(t / math.sqrt(dof))
    scale = math.exp(math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2)) / math.sqrt(math.pi)
    return float(scale * angle * (_WEIGHTS * np.cos((_NODES + 1) / 2 * angle) ** (dof - 1)).sum())
