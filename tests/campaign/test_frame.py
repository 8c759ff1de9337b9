"""The campaign's frame: journal, going on, a failing case, merging, and what a launch leaves."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.campaign import __main__ as campaign
from benchmarks.campaign import running
from benchmarks.campaign.cases import Case, Part
from benchmarks.campaign.journal import Journal, code_digest
from benchmarks.campaign.launching import MARK, processes_with

Run = Callable[..., int]


class Trials:
    """A part whose cases count how often they run; `broken` ones fail."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.broken = {"b"}

    def case(self, name: str) -> Case:
        def run(scratch: Path) -> dict[str, Any]:
            assert list(scratch.iterdir()) == []
            (scratch / "file").write_text("left")
            self.runs.append(name)
            assert name not in self.broken, f"{name} has broken its promise"
            return {"value": len(name)}

        return Case(name, run)

    def part(self, name: str = "flips", short: tuple[str, ...] = ("a",)) -> Part:
        def cases() -> list[Case]:
            return [self.case(letter) for letter in "abc"]

        return Part(name, 2, "nothing is lost", cases, short, lambda figures: {"sum": sum(f["value"] for f in figures)})


@pytest.fixture
def trials() -> Trials:
    return Trials()


@pytest.fixture
def run(trials: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(campaign, "load", lambda _names: iter([trials.part()]))

    def run_campaign(*words: str) -> int:
        folders = ["--folder", str(tmp_path / "journal"), "--scratch", str(tmp_path / "scratch")]
        return campaign.main([*words, *folders, "--out", str(tmp_path / "result.json")])

    return run_campaign


def test_failed_case_is_told_and_kept_and_the_part_goes_on(
    run: Run, trials: Trials, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("flips") == 1
    assert trials.runs == ["a", "b", "c"]
    printed = capsys.readouterr().out
    assert "b has broken its promise" in printed
    assert "flips 2/3 b: FAILED in" in printed
    assert "1 failed: flips/b" in printed
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["campaign-flips-b"]
    assert str(tmp_path / "scratch" / "campaign-flips-b") in printed
    result = json.loads((tmp_path / "result.json").read_text())["flips"]
    told = ("point", "promise", "cases", "passed", "failed", "figures", "command")
    assert {key: result[key] for key in told} == {
        "point": 2,
        "promise": "nothing is lost",
        "cases": 3,
        "passed": 2,
        "failed": ["b"],
        "figures": {"sum": 2},
        "command": "python -m benchmarks.campaign flips",
    }
    assert {"seconds", "commit", "changed", "date", "packages", "code"} <= set(result)


def test_same_command_runs_only_what_has_not_passed(run: Run, trials: Trials, tmp_path: Path) -> None:
    run("flips")
    trials.runs.clear()
    trials.broken.clear()
    assert run("flips") == 0
    assert trials.runs == ["b"]
    assert json.loads((tmp_path / "result.json").read_text())["flips"]["passed"] == 3
    assert run("flips") == 0
    assert trials.runs == ["b"]
    assert run("flips", "--again") == 0
    assert trials.runs == ["b", "a", "b", "c"]


def test_other_code_runs_every_case_again(run: Run, trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    trials.broken.clear()
    run("flips")
    monkeypatch.setattr(running, "code_digest", lambda: "other")
    assert run("flips") == 0
    assert trials.runs == ["a", "b", "c"] * 2


def test_case_during_which_the_code_changed_does_not_count(
    run: Run, trials: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trials.broken.clear()
    monkeypatch.setattr(running, "code_digest", lambda: f"code {len(trials.runs)}")
    run("flips")
    assert "flips c: the code changed while it ran" in capsys.readouterr().out
    assert not (tmp_path / "result.json").exists()
    assert Journal(tmp_path / "journal" / "flips.jsonl").passed("code 0") == {}


def test_short_form_runs_its_cases_and_writes_no_result(run: Run, trials: Trials, tmp_path: Path) -> None:
    assert run("flips", "--short") == 0
    assert trials.runs == ["a"]
    assert not (tmp_path / "result.json").exists()


def test_writing_one_part_leaves_the_others(run: Run, trials: Trials, tmp_path: Path) -> None:
    trials.broken.clear()
    (tmp_path / "result.json").write_text(json.dumps({"exact": {"cases": 48}}))
    run("flips")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["exact"] == {"cases": 48}
    assert result["flips"]["passed"] == 3


def test_unexpected_error_is_a_failed_case_with_its_traceback(
    run: Run, trials: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_scratch: Path) -> dict[str, Any]:
        raise KeyError("a key of the evidence")

    monkeypatch.setattr(trials, "case", lambda name: Case(name, broken))
    assert run("flips") == 1
    lines = (tmp_path / "journal" / "flips.jsonl").read_text().splitlines()
    assert "Traceback" in json.loads(lines[0])["evidence"]


def test_unknown_part_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("flipps")
    assert "no part flipps; there are exact, kills_sync" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "short", "problem"), [("aa", (), "the same name"), ("ab", ("c",), "names no case: c")]
)
def test_part_that_contradicts_itself_is_refused(
    trials: Trials, names: str, short: tuple[str, ...], problem: str
) -> None:
    part = Part("flips", 2, "", lambda: [trials.case(name) for name in names], short, lambda _: {})
    with pytest.raises(ValueError, match=problem):
        part.chosen(short=True)


def test_journal_survives_a_line_cut_short(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "flips.jsonl")
    journal.add({"case": "a", "code": "x", "passed": True})
    with (tmp_path / "flips.jsonl").open("a") as stream:
        stream.write('{"case": "b", "code"')
    assert set(journal.passed("x")) == {"a"}


def test_case_that_failed_after_it_had_passed_is_run_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "flips.jsonl")
    for passed in (True, False):
        journal.add({"case": "a", "code": "x", "passed": passed})
    assert journal.passed("x") == {}


def test_code_digest_follows_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[Journal.__module__]
    monkeypatch.setattr(module, "REPOSITORY", tmp_path)
    package = tmp_path / "inheritune_ds"
    package.mkdir()
    (tmp_path / "train.py").write_text("1")
    (package / "a.py").write_text("1")
    first = code_digest()
    assert code_digest() == first
    (package / "a.py").write_text("2")
    os.utime(package / "a.py", ns=(1, 1))
    assert code_digest() != first


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
