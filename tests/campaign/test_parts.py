"""Every part of the campaign: all of it under the marker `campaign`, short forms among the other tests."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.campaign import (
    elastic,
    exact,
    faults,
    flips,
    hangs,
    kills,
    pointer,
    publish,
    saving,
    screen,
    secrecy,
    signals,
    storage,
)
from benchmarks.campaign.part import Part
from benchmarks.campaign.results import Results
from benchmarks.record import RESULTS

PARTS: tuple[Part, ...] = (
    exact.PART,
    *kills.PARTS,
    publish.PART,
    flips.PART,
    pointer.PART,
    storage.PART,
    elastic.PART,
    faults.PART,
    hangs.PART,
    *signals.PARTS,
    secrecy.PART,
    screen.PART,
    saving.PART,
)
FIGURES: dict[str, dict[str, Any]] = {
    "elastic": {"stages": [1, 3]},
    "faults": {"left_out": 21, "settings": 3},
    "flips": {"flips": 40, "tampered": 15},
    "publish": {"faults": 8},
    "hangs": {"exit_code": 13},
}
"""Figures of short forms that show how much they tried."""


def cases_of(*parts: Part, short: bool) -> pytest.MarkDecorator:
    """Parametrize a test by parts and the names of their cases."""
    given = [
        pytest.param(part, name, id=f"{part.name}-{name}")
        for part in parts
        for name in (part.short if short else part.cases)
    ]
    return pytest.mark.parametrize(("part", "name"), given)


@pytest.mark.campaign
@pytest.mark.timeout(0)
@cases_of(*PARTS, short=False)
def test_full_form(part: Part, name: str, tmp_path: Path, results: Results) -> None:
    results.run(part, name, tmp_path)


def check_short_form(part: Part, name: str, scratch: Path) -> None:
    figures = part.cases[name](scratch)
    assert figures == {**figures, **FIGURES.get(part.name, {})}


@cases_of(flips.PART, pointer.PART, short=True)
def test_short_form(part: Part, name: str, tmp_path: Path) -> None:
    check_short_form(part, name, tmp_path)


@pytest.mark.usefixtures("forked")
@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.timeout(600)
@cases_of(elastic.PART, faults.PART, short=True)
def test_short_form_with_forked_ranks(part: Part, name: str, tmp_path: Path) -> None:
    check_short_form(part, name, tmp_path)


@pytest.mark.thorough
@pytest.mark.launch
@pytest.mark.timeout(600)
@cases_of(*kills.PARTS, publish.PART, hangs.PART, *signals.PARTS, secrecy.PART, screen.PART, short=True)
def test_short_form_with_launches(part: Part, name: str, tmp_path: Path) -> None:
    check_short_form(part, name, tmp_path)


def test_every_promise_has_a_part() -> None:
    assert Counter(part.point for part in PARTS) == {**dict.fromkeys(range(1, 14), 1), 2: 2, 10: 3}


def test_every_recorded_result_is_that_of_a_part() -> None:
    assert set(json.loads((RESULTS / "reliability.json").read_text())) == {part.name for part in PARTS}


def test_every_part_but_the_one_that_measures_time_has_a_short_form() -> None:
    assert all(set(part.short) <= set(part.cases) for part in PARTS)
    assert [part.name for part in PARTS if not part.short] == ["saving"]
