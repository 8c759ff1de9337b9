"""Statistics of subjects that are measured in turns: order, medians, intervals, verdicts, their table."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES, SEED = 4000, 20261121


@dataclass(frozen=True)
class Comparison:
    """Tokens/s of `above` over those of `below` in the same round.

    `bar` is the promised least ratio, or the most with `at_most`; None: nothing was promised.
    """

    name: str
    above: str
    below: str
    bar: float | None = None
    at_most: bool = False


def in_turns(names: Sequence[str], rounds: int) -> list[tuple[str, ...]]:
    """The order of the turns: A B C, C B A, A B C, ..."""
    return [tuple(names) if number % 2 == 0 else tuple(reversed(names)) for number in range(rounds)]


def summary(groups: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Median, range and 95 % interval of values in groups, one for each set of processes.

    The interval is that of the median under two-level resampling: of groups, then of values within each.
    """
    generator = np.random.default_rng(SEED)
    values = [np.asarray(group, dtype=np.float64) for group in groups]
    medians = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        drawn = (values[index] for index in generator.integers(len(values), size=len(values)))
        medians[number] = np.median(np.concatenate([generator.choice(group, len(group)) for group in drawn]))
    low, high = np.percentile(medians, [2.5, 97.5])
    every = np.concatenate(values)
    return {
        "median": float(np.median(every)),
        "interval_95": [float(low), float(high)],
        "min": float(every.min()),
        "max": float(every.max()),
        "rounds": len(every),
        "medians_of_sets": [float(np.median(group)) for group in values],
    }


def verdict(found: Mapping[str, Any], comparison: Comparison) -> str:
    """Whether a summary meets a comparison's bar: `met`, `met by the median alone`, `missed`, or nothing."""
    if comparison.bar is None:
        return ""
    low, high = found["interval_95"]
    sign = -1.0 if comparison.at_most else 1.0
    if sign * found["median"] < sign * comparison.bar:
        return "missed"
    worst = high if comparison.at_most else low
    return "met" if sign * worst >= sign * comparison.bar else "met by the median alone"


def ratios(values: Mapping[str, Sequence[float]], above: str, below: str) -> list[float]:
    """Values of one subject over those of another, round by round."""
    return [one / other for one, other in zip(values[above], values[below], strict=True)]


def judged(comparison: Comparison, groups: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Summary of a comparison's ratios, in groups as `summary` takes them, with its bar and verdict."""
    found = summary(groups)
    bar = {"bar": comparison.bar, "at_most": comparison.at_most, "verdict": verdict(found, comparison)}
    return {**found, **bar}


def table(title: str, rows: Iterable[tuple[str, Mapping[str, Any], str]]) -> list[str]:
    """Lines of a table of summaries and ratios, each with its label and the format of its numbers."""
    row = "{:<46}{:>14}  {:>26}  {:>26}  {}".format
    lines = [row(title, "median", "95 % interval", "range", "bar")]
    for label, found, form in rows:
        median, low, high = (format(value, form) for value in (found["median"], *found["interval_95"]))
        span = f"{found['min']:{form}} to {found['max']:{form}}" if "min" in found else ""
        bar = found.get("verdict", "")
        if found.get("bar") is not None:
            bar = f"{'at most' if found['at_most'] else 'at least'} {found['bar']:g}: {bar}"
        lines.append(row(label, median, f"{low} to {high}", span, bar).rstrip())
    return lines
