import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import side_by_side, side_by_side_cli
from benchmarks.comparison import Comparison, in_turns, summary, verdict
from benchmarks.side_by_side import Measured, report, write_tokens
from benchmarks.side_by_side_cli import batches, check_subjects, names, positive
from benchmarks.subjects import process
from benchmarks.subjects.process import Block, Subject
from benchmarks.subjects.turns import Order
from inheritune_ds.errors import MachineError
from tests.benchmarks import test_engine_tax

ORDER = Order(
    subject="plain",
    shape={"max_position_embeddings": 4},
    micro_batch=2,
    accumulation=3,
    device="cpu",
    keep_freed_memory=False,
    tokens="",
    folder="",
    warmup_steps=2,
    total_steps=100,
    started_s=0.0,
)
SETTING = replace(test_engine_tax.SETTING, subjects=("a", "b"), processes=2, blocks=2, block_s=1.0)
STAND_IN = """\
#!{python}
import json, sys
order = json.loads(sys.argv[3])
print(json.dumps({{"step_s": 0.5, "first_step_s": 9.0}}), flush=True)
for line in sys.stdin:
    steps = json.loads(line)["steps"]
    print("a turn", file=sys.stderr, flush=True)
    if steps == 7:
        sys.exit(3)
    windows = steps * order["micro_batch"] * order["accumulation"] - {missing}
    print(json.dumps(
        {{"steps": steps, "seconds": 0.25, "windows": windows, "loss": None, "peak_memory_gib": 1.0}}
    ), flush=True)
"""


def stand_in(folder: Path, missing: int = 0) -> Subject:
    """A process that answers as a subject does."""
    script = folder / "python"
    script.write_text(STAND_IN.format(python=sys.executable, missing=missing), encoding="utf-8")
    script.chmod(0o755)
    return Subject(ORDER, python=str(script), environ={}, log=folder / "log")


def block(seconds: float, other_cores: float | None = 0.0) -> Block:
    return Block(2, seconds, other_cores, 0, 8.3, 1.0)


def test_in_turns_alternates_the_order() -> None:
    assert in_turns("abc", 3) == [("a", "b", "c"), ("c", "b", "a"), ("a", "b", "c")]


def test_summary_includes_the_spread_between_processes() -> None:
    narrow = summary([[1.0, 1.01, 1.02], [1.0, 1.01, 1.02]])
    wide = summary([[1.0, 1.01, 1.02], [1.2, 1.21, 1.22]])
    assert narrow["median"] == 1.01
    assert (narrow["min"], narrow["max"], narrow["rounds"]) == (1.0, 1.02, 6)
    assert narrow["interval_95"] == [1.0, 1.02]
    assert wide["medians_of_sets"] == [1.01, 1.21]
    assert wide["interval_95"][0] <= 1.02
    assert wide["interval_95"][1] >= 1.2


@pytest.mark.parametrize(
    ("values", "bar", "kind", "expected"),
    [
        ([1.0, 1.0, 1.01], 1.03, "most", "met"),
        ([1.0, 1.0, 1.2], 1.03, "most", "met by the median alone"),
        ([1.04, 1.04, 1.0], 1.03, "most", "missed"),
        ([1.3, 1.3, 1.4], 1.25, "least", "met"),
        ([1.2, 1.3, 1.3], 1.25, "least", "met by the median alone"),
        ([1.2, 1.2, 1.3], 1.25, "least", "missed"),
        ([1.0, 1.0, 1.0], None, "least", ""),
    ],
)
def test_verdict_considers_the_interval(values: list[float], bar: float | None, kind: str, expected: str) -> None:
    assert verdict(summary([values]), Comparison("", "", "", bar, at_most=kind == "most")) == expected


def test_ratios_compare_the_same_round() -> None:
    rounds = [
        [{"a": block(1.0), "b": block(2.0)}, {"a": block(2.0), "b": block(1.0)}],
        [{"a": block(1), "b": block(1)}],
    ]
    measured = Measured(SETTING, rounds, [])
    assert measured.tokens_per_s("a") == [[16384.0, 8192.0], [16384.0]]
    assert measured.ratios(Comparison("", "a", "b")) == [[2.0, 0.5], [1.0]]


def test_report_has_the_bars_and_every_round() -> None:
    first = {"first_step_s": 4.0, "versions": {"torch": "2"}, "notes": ["compiled"]}
    slow = replace(block(2.0, 0.05), repeats=2)
    measured = Measured(SETTING, [[{"a": block(1.0), "b": slow}]] * 2, [{"a": first, "b": first}] * 2)
    told = [Comparison("a over b", "a", "b", 2.5), Comparison("a over c", "a", "c", 1.0)]
    figures, lines = report(measured, told)
    assert set(figures["ratios"]) == {"a over b"}
    assert figures["ratios"]["a over b"]["verdict"] == "missed"
    assert figures["subjects"]["b"]["repeated_blocks"] == 4
    assert figures["subjects"]["b"]["max_other_cores"] == 0.05
    assert figures["subjects"]["a"]["notes"] == ["compiled"]
    assert figures["rounds"] == [[{"a": [2, 1.0, 0.0], "b": [2, 2.0, 0.05]}]] * 2
    json.dumps(figures, allow_nan=False)
    assert lines[-1].split("  ")[-1] == "at least 2.5: missed"
    assert "2.000 to 2.000" in lines[-1]


def test_write_tokens_is_random_and_repeatable(tmp_path: Path) -> None:
    for name in ("one", "other"):
        write_tokens(tmp_path / name, {"max_position_embeddings": 2, "vocab_size": 100})
    found = (tmp_path / "one").read_bytes()
    assert found == (tmp_path / "other").read_bytes()
    assert len(found) == 2 * (2 * side_by_side.WINDOWS + 1)
    assert len(set(found[::2])) == 100


def test_subject_makes_whole_steps_of_about_the_requested_time(tmp_path: Path) -> None:
    subject = stand_in(tmp_path)
    try:
        assert subject.first["first_step_s"] == 9.0
        assert [subject.block(seconds).steps for seconds in (0.0, 1.6)] == [1, 3]
        with pytest.raises(
            MachineError, match=r"^the subject plain ended by itself; .*output:\na turn\na turn\na turn"
        ):
            subject.block(3.5)
    finally:
        subject.end()


def test_subject_refuses_another_batch(tmp_path: Path) -> None:
    subject = stand_in(tmp_path, missing=1)
    try:
        with pytest.raises(
            MachineError, match=r"plain read 11 windows in 2 steps, not 12(?s:.)*do: fix the error above"
        ):
            subject.block(1.0)
    finally:
        subject.end()


def test_subject_refuses_a_missing_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "START_TIMEOUT_S", 0.0)
    with pytest.raises(MachineError, match="the subject plain did not answer within 0 s"):
        stand_in(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_cpu_seconds_counts_the_session() -> None:
    code = "import time\nwhile time.process_time() < 0.3: pass\nprint('busy', flush=True)\ninput()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, start_new_session=True) as busy:
        assert busy.stdout is not None
        assert busy.stdout.readline() == b"busy\n"
        own, without = process._cpu_seconds(busy.pid), process._cpu_seconds(-1)
        busy.communicate(b"\n")
    assert own is not None
    assert without is not None
    assert 0.2 <= own[1] - without[1] <= 0.5
    assert own[0] > own[1]  # the machine has done more than that


def test_other_cores_is_the_rest() -> None:
    assert process._other_cores((10.0, 5.0), (13.0, 6.0), 2.0) == 1.0
    assert process._other_cores((10.0, 5.0), (11.0, 6.5), 2.0) == 0.0
    assert process._other_cores(None, None, 2.0) is None


def test_wait_until_quiet_waits_for_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "SAMPLE_S", 0.01)
    times = iter([(0.0, 0.0), (100.0, 0.0), (100.0, 0.0), (100.0, 0.0)])  # busy, then not
    monkeypatch.setattr(process, "_cpu_seconds", lambda _session: next(times))
    assert process.wait_until_quiet(0.1, 60.0)
    assert next(times, None) is None
    busy = iter(range(0, 10_000, 100))
    monkeypatch.setattr(process, "_cpu_seconds", lambda _session: (float(next(busy)), 0.0))
    assert not process.wait_until_quiet(0.1, 0.05)


def test_quiet_block_repeats_disturbed_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Disturbed:
        order = ORDER

        def __init__(self, *others: float) -> None:
            self.others = iter(others)

        def block(self, _seconds: float) -> Block:
            return block(1.0, next(self.others))

    waited: list[float] = []
    monkeypatch.setattr(side_by_side, "wait_until_quiet", lambda limit, _patience: waited.append(limit))
    given: list[Any] = [Disturbed(0.05), Disturbed(1.0, 0.3, 0.1), Disturbed(1.0, 0.5, 0.3, 0.9, 0.0)]
    found = [side_by_side._quiet_block(subject, SETTING) for subject in given]
    assert [(b.other_cores, b.repeats) for b in found] == [(0.05, 0), (0.1, 2), (0.3, 3)]
    assert waited == [0.1] * (2 + 3)


def test_options_are_read_or_refused() -> None:
    assert batches("8x4,4x1") == [(8, 4), (4, 1)]
    assert positive("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match=r"'0' is not a whole number from 1 on"):
        positive("0")
    assert names("plain,project") == ["plain", "project"]
    with pytest.raises(argparse.ArgumentTypeError, match=r"'8x' is not MICRO_BATCHxACCUMULATION, such as 8x4,4x1"):
        batches("8x")
    with pytest.raises(argparse.ArgumentTypeError, match=r"no subject: plan; there are plain, plain_master, "):
        names("plain,plan")
    with pytest.raises(argparse.ArgumentTypeError, match=r"a name is repeated: plain,plain"):
        names("plain,plain")


@pytest.mark.parametrize(
    ("chosen", "given", "message"),
    [
        ("litgpt", {}, r"litgpt needs an interpreter.*--litgpt-python is None\n  do: python -m venv"),
        ("litgpt", {"litgpt_python": "/nowhere/python"}, r"--litgpt-python is /nowhere/python"),
        (
            "nanogpt",
            {"nanogpt": "/"},
            r"nanoGPT has no llama\n  allowed: gpt2, gpt2-medium-16l\n  do: give --shape gpt2",
        ),
        ("nanogpt", {"shape": "gpt2"}, r"nanogpt needs a checkout.*--nanogpt is None\n  do: git clone"),
        ("nanogpt", {"shape": "gpt2", "nanogpt": "/nowhere"}, r"--nanogpt is /nowhere"),
    ],
)
def test_check_subjects_refuses_missing_ones(chosen: str, given: dict[str, Any], message: str) -> None:
    args = argparse.Namespace(**{"shape": "llama", "litgpt_python": None, "nanogpt": None, **given})
    with pytest.raises(MachineError, match=message):
        check_subjects([chosen], args)
    check_subjects(["plain", "project"], args)


def test_main_exits_with_the_code_of_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    command = side_by_side_cli.Benchmark("tried", "", lambda _: ("litgpt",), "1x1", "keep", lambda _: ())
    assert command.main([]) == MachineError.exit_code
    assert capsys.readouterr().err.startswith("tried: error: the subject litgpt needs an interpreter")
