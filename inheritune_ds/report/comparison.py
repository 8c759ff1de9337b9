"""Compare two models on the same validation windows."""

from dataclasses import dataclass

import numpy as np

from inheritune_ds.data.window_losses import window_mean
from inheritune_ds.errors import RunFolderError
from inheritune_ds.report.results import Evaluation

CLEAR_STANDARD_ERRORS = 3.0
"""Smaller differences are reported as no difference."""


@dataclass(frozen=True)
class Difference:
    """A paired comparison of two models on the same validation windows."""

    of: str
    to: str
    mean: float
    """Mean over counted targets of loss(of) - loss(to), nats per token; negative: `of` is better."""
    stderr: float
    """Its standard error, from the differences of the windows."""
    windows: int
    ratio: float | None
    """mean / stderr; None when every window differs by the same amount."""
    words: str


def paired_difference(of: str, a: Evaluation, to: str, b: Evaluation) -> Difference:
    """Compare model `of` with losses `a` and model `to` with losses `b`, window by window.

    Raises the error of `check_same_windows`, and a RunFolderError for fewer than two windows.
    """
    check_same_windows(of, a, to, b)
    if len(a.windows) < 2:
        raise RunFolderError(
            f"{of} was validated on {len(a.windows)} windows, which has no standard error",
            allowed="two windows or more",
            action="raise validation.max_tokens to at least 2 x training.seq_len",
        )
    differences = np.asarray(a.windows) - np.asarray(b.windows)
    mean, stderr = window_mean(differences, a.targets)
    ratio = mean / stderr if stderr else None
    return Difference(of, to, mean, stderr, len(differences), ratio, _in_words(mean, ratio))


def check_same_windows(of: str, a: Evaluation, to: str, b: Evaluation) -> None:
    """Raise a RunFolderError that names the first difference of two evaluations in windows or tokens."""
    found = [
        (
            f"{len(one.windows)} windows",
            f"windows of {one.seq_len} tokens",
            f"the text {one.tokens_sha256[:12]}",
            f"{sum(one.targets)} targets, documents kept apart" if one.targets else "every target",
        )
        for one in (a, b)
    ]
    differing = next(((one, other) for one, other in zip(*found, strict=True) if one != other), None)
    if differing is not None:
        raise RunFolderError(
            f"{of} was validated on {differing[0]} and {to} on {differing[1]}: they cannot be compared",
            allowed="the same held-out windows: one corpus, tokenizer, corpus.validation_ratio, corpus.max_tokens, "
            "training.seq_len, training.packing and validation.max_tokens for both",
            action="make these equal in the recipes, and train one of the two again under a new name",
        )


def _in_words(mean: float, ratio: float | None) -> str:
    side = "below" if mean < 0 else "above"
    if ratio is None:
        return f"{side} by the same amount in every window" if mean else "equal in every window"
    if abs(ratio) <= CLEAR_STANDARD_ERRORS:
        return f"no difference beyond {CLEAR_STANDARD_ERRORS:.0f} standard errors"
    return f"{side} by {abs(ratio):.1f} standard errors"
