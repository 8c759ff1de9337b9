import argparse
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from benchmarks import gpu
from benchmarks.gpu_parts import throughput
from benchmarks.gpu_parts.case import Trained
from benchmarks.gpu_parts.part import Part
from benchmarks.gpu_parts.watchdog import Start, watch
from inheritune_ds.errors import MachineError
from inheritune_ds.storage.files import read_json
from tests.benchmarks.test_gpu_parts import part_in
from tests.launching import ROOT, environment

# The watchdog


def python(code: str, folder: Path, *, limit_s: float = 60.0) -> Start:
    return Start([sys.executable, "-c", textwrap.dedent(code)], {}, folder / "log", limit_s)


def is_running(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_watchdog_reports_the_end_of_a_process(tmp_path: Path) -> None:
    well, badly = watch([python("pass", tmp_path), python("raise SystemExit(3)", tmp_path)])
    assert (well.code, badly.code) == (0, 3)
    assert badly.words == "its process ended with code 3"


@pytest.mark.parametrize(("hangs", "limit_s"), [(True, 5.0), (False, 60.0)])
def test_watchdog_ends_children_in_other_sessions(tmp_path: Path, *, hangs: bool, limit_s: float) -> None:
    child = tmp_path / "child"
    code = f"""
        import pathlib, subprocess, sys, time
        sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
        started = subprocess.Popen(sleeper, start_new_session=True)
        pathlib.Path({str(child)!r}).write_text(str(started.pid))
        time.sleep(600 * {hangs})
    """
    (ending,) = watch([python(code, tmp_path, limit_s=limit_s)])
    if hangs:
        assert ending.code is None
        assert 5.0 <= ending.seconds < 60.0
        assert ending.words == f"ended after {ending.seconds:.0f} s: its time was over"
    else:
        assert ending.code == 0
    assert not is_running(int(child.read_text(encoding="utf-8")))


# The command


def test_names_are_sorted_by_value() -> None:
    assert gpu.names("loss,parity-llama") == ["parity-llama", "loss"]
    with pytest.raises(argparse.ArgumentTypeError, match=r"no part: speed; there are device, parity-llama, mfu-1\.8b"):
        gpu.names("loss,speed")


@pytest.mark.parametrize("text", ["0", "-1", "many", "nan", "inf"])
def test_minutes_refuses_numbers_not_above_zero(text: str) -> None:
    assert gpu.minutes("0.5") == 0.5
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number of minutes above 0"):
        gpu.minutes(text)


def test_list_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(gpu.PARTS)
    assert [float(line.split()[1]) for line in lines] == [
        pytest.approx(entry.expected_s / 60.0, abs=0.06) for entry in gpu.PARTS.values()
    ]


def test_no_part_is_expected_to_come_near_its_limit() -> None:
    for name, entry in gpu.PARTS.items():
        assert entry.expected_s <= 0.9 * 60.0 * gpu.DEFAULT_MINUTES, name


def test_the_first_parts_fit_into_commands_of_ten_minutes_and_half_an_hour() -> None:
    minutes = [entry.expected_s / 60.0 for entry in gpu.PARTS.values()]
    names = list(gpu.PARTS)
    groups = (names[:2], names[2:4], names[4:7], names[7:8])
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for group in groups:
        assert sum(minutes[names.index(name)] for name in group) <= 9.0, group
        assert f"--only {','.join(group)} " in text
    assert sum(minutes[:8]) <= 27.0


def test_main_exits_with_10_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "detect_gpus", list)
    assert gpu.main([]) == MachineError.exit_code == 10
    printed = capsys.readouterr().err
    assert printed.startswith("gpu: error: nvidia-smi reports no GPU: nothing was checked")
    assert "do: give --rehearse" in printed


def test_main_refuses_a_checkout_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--rehearse", "--nanogpt", str(tmp_path)]) == 10
    assert f"--nanogpt {tmp_path} has no model.py" in capsys.readouterr().err


FAKE = """
import json, pathlib, sys, time
for name, path in {paths!r}.items():
    does = {does!r}[name]
    found = json.loads(pathlib.Path(path).read_text())
    found |= {{"reason": "", "missing": [], "bars": {{}}, "lines": ["so far"], "figures": {{"found": 1}}}}
    if does not in ("crash", "hang"):
        found["status"] = does
    pathlib.Path(path).write_text(json.dumps(found))
    if does == "crash":
        print("the last words")
        sys.exit(7)
    if does == "hang":
        time.sleep(600)
"""


def run_fake(monkeypatch: pytest.MonkeyPatch, out: Path, does: dict[str, str]) -> tuple[int, dict[str, dict[str, Any]]]:
    def start(args: argparse.Namespace, group: list[str], scratch: Path) -> Start:
        code = FAKE.format(paths={name: str(gpu.result_path(args, name)) for name in group}, does=does)
        return Start([sys.executable, "-c", code], {}, scratch / "log", 60.0 * args.minutes)

    monkeypatch.setattr(gpu, "_start", start)
    monkeypatch.setattr(gpu, "detect_gpus", lambda: ["one"])
    code = gpu.main(["--only", ",".join(does), "--out", str(out), "--minutes", "0.1"])
    files = {name: list(out.glob(f"gpu-{name}-20??-??-??.json")) for name in does}
    return code, {name: json.loads(file.read_text(encoding="utf-8")) for name, (file,) in files.items()}


def test_main_exits_with_0_if_parts_pass_or_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = run_fake(monkeypatch, tmp_path, {"device": "ok", "peers": "skipped"})
    assert code == 0
    assert {name: one["status"] for name, one in found.items()} == {"device": "ok", "peers": "skipped"}
    assert found["device"]["part"] == "device"
    assert found["device"]["rehearsal"] is False
    assert set(found["device"]["environment"]) >= {"command", "date", "packages", "gpus"}
    table = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split()[:2] for line in table] == [["device", "ok"], ["peers", "skipped"]]


@pytest.mark.parametrize(
    ("does", "status", "reason"),
    [
        ("missed", "missed", ""),
        ("crash", "failed", "its process ended with code 7"),
        ("hang", "failed", "its time was over"),
    ],
)
def test_main_exits_with_1_and_keeps_all_findings(
    does: str, status: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, found = run_fake(monkeypatch, tmp_path, {"device": does, "loss": "ok"})
    assert code == 1
    assert found["loss"]["status"] == "ok"
    bad = found["device"]
    assert (bad["status"], bad["reason"].endswith(reason)) == (status, True)
    assert (bad["figures"], bad["lines"]) == ({"found": 1}, ["so far"])
    if does == "crash":
        assert bad["log_end"] == "the last words\n"


def test_table_shows_the_reason(tmp_path: Path) -> None:
    bars = {"MFU": {"value": 0.5, "at_least": 0.55, "verdict": "missed"}}
    one = {"status": "missed", "reason": "", "bars": bars, "lines": ["a line"], "missing": ["x", "y"], "seconds": 12.34}
    lines = gpu.table({"mfu-1.8b": one})
    assert lines == [
        "mfu-1.8b       missed      12.3 s  MFU 0.5 (at least 0.55: missed)",
        "    MFU 0.5 (at least 0.55: missed)",
        "    a line",
        "    missing: x, y",
    ]
    failed = {**one, "status": "failed", "reason": "first\nsecond", "seconds": 1.0}
    assert gpu.table({"loss": failed}, bars=False) == ["loss           failed       1.0 s  first"]


def test_run_here_reports_the_error_of_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Part) -> None:
        raise ZeroDivisionError("by what?")

    monkeypatch.setattr("benchmarks.gpu_parts.startup.startup", broken)
    assert gpu.main(["--rehearse", "--part", "startup", "--json", str(tmp_path), "--date", "2026-12-01"]) == 0
    found = read_json(tmp_path / "gpu-startup-2026-12-01.json")
    assert found is not None
    assert (found["status"], found["reason"]) == ("failed", "ZeroDivisionError: by what?")


# A kill

STALLING = """
import os, sys, time, types
from benchmarks import gpu

def stall(part):
    part.report.expect("one", "two", "three")
    part.report.figure("process", os.getpid())
    part.report.done("one")
    time.sleep(600)

module = types.ModuleType("benchmarks.gpu_parts.stalling")
module.stall = stall
sys.modules[module.__name__] = module
gpu.PARTS["loss"] = gpu.Entry("stalling:stall", "", 3, 1)
sys.exit(gpu.main(sys.argv[1:]))
"""
"""Runs the process of the part `loss`, which stops after the first of three cases."""


def run_stalling(out: str, limit_minutes: str) -> int:
    """The command, whose part stalls in a process of its own."""
    real = gpu._start

    def start(args: argparse.Namespace, group: list[str], scratch: Path) -> Start:
        given = real(args, group, scratch)
        return replace(given, command=[given.command[0], "-c", STALLING, *given.command[3:]])

    with patch.object(gpu, "_start", start):
        return gpu.main(["--rehearse", "--only", "loss", "--out", out, "--minutes", limit_minutes])


def test_part_that_is_killed_at_its_limit_leaves_its_finished_cases(tmp_path: Path) -> None:
    assert run_stalling(str(tmp_path), "0.25") == 1
    (file,) = tmp_path.iterdir()
    found = read_json(file)
    assert (found["status"], found["reason"]) == ("failed", "ended after 15 s: its time was over")
    assert (found["missing"], found["seconds"]) == (["two", "three"], pytest.approx(15.0, abs=5.0))
    assert (found["part"], found["rehearsal"]) == ("loss", True)
    assert set(found["environment"]) >= {"command", "date", "packages", "gpus"}
    assert not is_running(found["figures"]["process"])


def test_command_that_is_killed_leaves_the_finished_cases(tmp_path: Path) -> None:
    code = f"from tests.benchmarks.test_gpu import run_stalling; run_stalling({str(tmp_path)!r}, '5')"
    command = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment())
    found: dict[str, Any] = {}
    try:
        deadline_s = time.monotonic() + 60.0
        while found.get("missing") != ["two", "three"]:
            assert time.monotonic() < deadline_s, found
            time.sleep(0.05)
            files = list(tmp_path.glob("gpu-*.json"))
            found = read_json(files[0]) if files else {}
    finally:
        command.kill()
        command.wait()
        if "figures" in found:
            os.kill(found["figures"]["process"], signal.SIGKILL)
    (file,) = tmp_path.glob("gpu-*.json")
    left = json.loads(file.read_text(encoding="utf-8"))
    assert (left["status"], left["missing"], left["part"]) == ("running", ["two", "three"], "loss")
    assert "environment" in left


# All of it


BROKEN = """
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

own = LlamaMLP.forward

def broken(self, hidden):
    torch._dynamo.graph_break()
    return own(self, hidden)

LlamaMLP.forward = broken

from benchmarks.gpu_parts.case import main

main()
"""


@pytest.mark.rehearsal
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_rehearsal_finds_a_break_of_a_graph(tmp_path: Path) -> None:
    case = throughput.case_of(part_in(tmp_path, rehearse=True), throughput.TARGET, micro_batch=2)
    words = [json.dumps(asdict(case)), str(tmp_path / "case.json")]
    environ = {**environment(), **gpu.ENVIRON, **gpu.REHEARSAL_ENVIRON}
    subprocess.run([sys.executable, "-c", BROKEN, *words], cwd=ROOT, env=environ, check=True)
    assert read_json(tmp_path / "case.json")["breaks"] > 0


@pytest.mark.rehearsal
@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.timeout(1800)  # a first start builds DeepSpeed's operators
def test_rehearsal_runs_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = gpu.main(["--rehearse", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    found = {}
    for name in gpu.PARTS:
        (file,) = tmp_path.glob(f"gpu-{name}-20??-??-??.json")
        found[name] = json.loads(file.read_text(encoding="utf-8"))
    states = {name: one["status"] for name, one in found.items()}
    assert states == {**dict.fromkeys(gpu.PARTS, "ok"), "peers": "skipped"}, printed
    assert code == 0
    assert all(one["rehearsal"] for one in found.values())

    assert all(one["missing"] == [] for name, one in found.items() if name != "peers")
    counts = {"mfu-1.8b": 2, "mfu-medium": 2, "mfu-large": 2, "planner-llama": 4, "planner-gpt2": 3, "a6000": 1}
    for name, count in (counts | {"a6000-fit": 2}).items():
        cases = [Trained(**case) for case in found[name]["figures"]["cases"]]
        assert len(cases) == count
        for case in cases:
            assert (case.steps, case.step_tokens, case.micro_batch * case.accumulation) == (2, 64, 4)
            assert (case.graphs >= 2) == ("eager" not in case.name), "blocks and loss are captured"
            assert case.left_eager == case.breaks == case.recompiles == 0
            assert case.loss == pytest.approx(6.24, abs=0.1)  # untrained, on random tokens: ln 512
            assert case.tokens_per_s["min"] <= case.tokens_per_s["median"] <= case.tokens_per_s["max"]
            assert 0.0 < case.outside_ratio < 1.0
            assert case.mfu is case.peak_gib is case.predicted_tokens_per_s is None
            assert case.predicted_gib is not None
            assert 0.0 < case.predicted_gib < 0.1
    kernels = [" ".join(case["notes"]) for case in found["planner-llama"]["figures"]["cases"]]
    assert ["activation_checkpointing: full" in notes for notes in kernels] == [False, False, True, False]
    for family in ("llama", "gpt2"):
        assert set(found[f"parity-{family}"]["bars"]) == {
            f"{what}, {family}, {precision}"
            for what in ("gradients over their limit", "tensors twice as far off as eager")
            for precision in ("fp32", "bf16")
        }
        assert set(found[f"packing-{family}"]["figures"]["packing"]) == {"sdpa"}
        assert len(found[f"packing-{family}"]["bars"]) == 5
    assert set(found["optimizers"]["bars"]) == {"updates of the optimizers"}
    assert found["fp32"]["figures"]["run"]["precision"] == "fp32"
    assert found["resume"]["figures"]["final weights bit-equal"] is True
    assert set(found["loss"]["figures"]["losses"]) == {"chunked, compiled", "chunked", "plain"}
    subjects = {name: list(found[name]["figures"]["side by side"]["subjects"]) for name in ("engine-tax", "trainer")}
    assert subjects == {
        "engine-tax": ["plain_master_compiled", "project_compiled"],
        "trainer": ["project_shipped", "hf_trainer"],
    }
    assert os.environ.get("RANK") is None
