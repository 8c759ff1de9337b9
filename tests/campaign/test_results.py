"""Recording the campaign: outcomes are kept, a complete part is merged, a campaign is resumed."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.campaign import results as campaign
from benchmarks.campaign.launching import MARK, processes_with
from benchmarks.campaign.part import Part
from benchmarks.campaign.results import Results, code_digest


class Trials:
    """A part of three cases; `broken` ones fail."""

    def __init__(self, folder: Path, cache: pytest.Cache) -> None:
        self.folder, self.cache = folder, cache
        self.broken = {"b"}
        cases = {name: lambda _scratch, name=name: self.case(name) for name in "abc"}
        self.part = Part(
            "flips", 2, "nothing is lost", cases, ("a",), lambda figures: {"sum": sum(f["value"] for f in figures)}
        )

    def case(self, name: str) -> dict[str, Any]:
        assert name not in self.broken, f"{name} has broken its promise"
        return {"value": 1}

    def run(self, names: str = "abc") -> Results:
        results = Results(self.cache, self.folder / "result.json")
        for name in names:
            if name in self.broken:
                with pytest.raises(AssertionError, match=f"{name} has broken its promise"):
                    results.run(self.part, name, self.folder)
            else:
                results.run(self.part, name, self.folder)
        return results

    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "result.json").read_text())["flips"]
        return found


@pytest.fixture
def trials(tmp_path: Path, pytestconfig: pytest.Config) -> Trials:
    cache = pytest.Cache(tmp_path / "cache", pytestconfig, _ispytest=True)
    return Trials(tmp_path, cache)


def test_complete_part_is_merged_into_the_results_of_the_others(trials: Trials) -> None:
    (trials.folder / "result.json").write_text(json.dumps({"exact": {"cases": 48}}))
    trials.run()
    assert json.loads((trials.folder / "result.json").read_text())["exact"] == {"cases": 48}
    result = trials.result()
    expected = {
        "point": 2,
        "promise": "nothing is lost",
        "cases": 3,
        "passed": 2,
        "failed": ["b"],
        "figures": {"sum": 2},
        "command": "make campaign ARGS='-k flips'",
    }
    assert {key: result[key] for key in expected} == expected
    assert {"seconds", "commit", "changed", "date", "packages", "code"} <= set(result)


def test_part_is_completed_by_a_later_session(trials: Trials) -> None:
    assert trials.run("ab").passed(trials.part) == {"a"}
    assert not (trials.folder / "result.json").exists()
    trials.broken.clear()
    assert trials.run("bc").passed(trials.part) == {"a", "b", "c"}
    assert trials.result()["passed"] == 3


def test_outcomes_of_other_code_are_ignored(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    trials.run("ab")
    monkeypatch.setattr(campaign, "code_digest", lambda: "other")
    assert trials.run("c").passed(trials.part) == {"c"}
    assert not (trials.folder / "result.json").exists()


def test_case_during_which_the_code_changed_is_not_recorded(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(trials.cache, trials.folder / "result.json")
    monkeypatch.setattr(campaign, "code_digest", lambda: "other")
    with pytest.raises(RuntimeError, match="the code changed while flips-a ran"):
        results.run(trials.part, "a", trials.folder)
    assert results.passed(trials.part) == set()


def test_code_digest_depends_on_the_content(tmp_path: Path) -> None:
    package = tmp_path / "inheritune_ds"
    package.mkdir()
    (tmp_path / "train.py").write_text("1")
    (package / "a.py").write_text("1")
    first = code_digest(tmp_path)
    assert code_digest(tmp_path) == first
    (package / "a.py").write_text("2")
    assert code_digest(tmp_path) != first


def test_processes_are_found_in_any_session() -> None:
    mark = f"test#{os.getpid()}"
    process = subprocess.Popen(["sleep", "60"], env={**os.environ, MARK: mark}, start_new_session=True)
    try:
        deadline_s = time.monotonic() + 10
        while not processes_with(mark) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert processes_with(mark) == [process.pid]
    finally:
        process.kill()
        process.wait()
    assert processes_with(mark) == []
