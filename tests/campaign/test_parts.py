"""Every part of the campaign, without running one."""

import json
from collections import Counter

import pytest

from benchmarks.campaign.__main__ import MODULES, load, main
from benchmarks.campaign.cases import Part
from benchmarks.record import RESULTS


@pytest.fixture(scope="module")
def parts() -> list[Part]:
    return list(load(list(MODULES)))


def test_every_promise_has_a_part(parts: list[Part]) -> None:
    assert [part.name for part in parts] == list(MODULES)
    assert Counter(part.point for part in parts) == {**dict.fromkeys(range(1, 13), 1), 2: 2, 10: 3}


def test_every_recorded_result_is_that_of_a_part() -> None:
    assert set(json.loads((RESULTS / "reliability.json").read_text())) == set(MODULES)


def test_every_part_has_the_same_cases_at_every_call(parts: list[Part]) -> None:
    for part in parts:
        names = [case.name for case in part.chosen(short=False)]
        assert names == [case.name for case in part.chosen(short=False)] != [], part.name


def test_every_part_but_the_one_that_measures_time_has_a_short_form(parts: list[Part]) -> None:
    assert [part.name for part in parts if not part.chosen(short=True)] == ["saving"]


def test_case_name_can_be_the_name_of_a_folder(parts: list[Part]) -> None:
    names = [case.name for part in parts for case in part.chosen(short=False)]
    assert [name for name in names if "/" in name or len(name) > 100] == []


def test_list_tells_every_part_with_its_promise(parts: list[Part], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(MODULES)
    assert [part.name for part, line in zip(parts, lines, strict=True) if part.promise not in line] == []
