"""A part of the campaign: all trials of one promise."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
"""Measurements of one case, as JSON holds them."""
Cases = Mapping[str, Callable[[Path], Figures]]
"""Trials by name. Each gets an empty scratch folder and raises AssertionError with the evidence of a broken promise."""


@dataclass(frozen=True)
class Part:
    """The proof of one promise.

    Attributes:
        point: Number of the promise in docs/explanation/reliability.md.
        short: Names of the cases that `make test-all` runs.
        summary: Figures of all cases that passed -> figures of the part.
    """

    name: str
    point: int
    promise: str
    cases: Cases
    short: tuple[str, ...]
    summary: Callable[[list[Figures]], Mapping[str, Any]]


def totals(*sums: str, most: Sequence[str] = ()) -> Callable[[list[Figures]], Figures]:
    """A summary: the sum of each of some figures, the largest of each of others, over the cases that have them."""

    def summary(cases: list[Figures]) -> Figures:
        summed = {key: sum(case.get(key, 0) for case in cases) for key in sums}
        return summed | {key: max((case[key] for case in cases if key in case), default=None) for key in most}

    return summary
