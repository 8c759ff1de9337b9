import argparse
import json
import os
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu_parts import ratios
from benchmarks.gpu_parts.case import Trained
from benchmarks.gpu_parts.part import Part
from benchmarks.gpu_parts.watchdog import Start, watch
from inheritune_ds.errors import MachineError
from inheritune_ds.storage.files import read_json

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


def test_watchdog_ends_children_in_other_sessions(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = f"""
        import pathlib, subprocess, sys, time
        sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
        started = subprocess.Popen(sleeper, start_new_session=True)
        pathlib.Path({str(child)!r}).write_text(str(started.pid))
        time.sleep(600)
    """
    (ending,) = watch([python(code, tmp_path, limit_s=5.0)])
    assert ending.code is None
    assert 5.0 <= ending.seconds < 60.0
    assert ending.words == f"ended after {ending.seconds:.0f} s: its time was over"
    assert not is_running(int(child.read_text(encoding="utf-8")))


def test_watchdog_ends_remaining_children(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = f"""
        import pathlib, subprocess, sys
        sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
        started = subprocess.Popen(sleeper, start_new_session=True)
        pathlib.Path({str(child)!r}).write_text(str(started.pid))
    """
    (ending,) = watch([python(code, tmp_path)])
    assert ending.code == 0
    assert not is_running(int(child.read_text(encoding="utf-8")))


# The command


def test_names_are_sorted_by_value() -> None:
    assert gpu.names("loss,parity") == ["parity", "loss"]
    with pytest.raises(argparse.ArgumentTypeError, match=r"no part: speed; there are parity, packing, mfu-1\.8b"):
        gpu.names("parity,speed")


@pytest.mark.parametrize("text", ["0", "-1", "many", "nan", "inf"])
def test_minutes_refuses_numbers_not_above_zero(text: str) -> None:
    assert gpu.minutes("0.5") == 0.5
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number of minutes above 0"):
        gpu.minutes(text)


def test_list_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(gpu.PARTS)


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
folder = pathlib.Path({folder!r})
for name in {group!r}:
    does = {does!r}[name]
    found = {{"status": does, "reason": "", "bars": {{}}, "lines": ["so far"], "figures": {{"found": 1}}}}
    if does in ("crash", "hang"):
        found["status"] = "running"
    (folder / (name + ".json")).write_text(json.dumps(found))
    if does == "crash":
        print("the last words")
        sys.exit(7)
    if does == "hang":
        time.sleep(600)
"""


def run_fake(monkeypatch: pytest.MonkeyPatch, out: Path, does: dict[str, str]) -> tuple[int, dict[str, dict[str, Any]]]:
    """The command on a machine with a GPU, whose parts behave as given by `does`."""

    def start(args: argparse.Namespace, group: list[str], scratch: Path) -> Start:
        code = FAKE.format(folder=str(scratch), group=group, does=does)
        return Start([sys.executable, "-c", code], {}, scratch / "log", 60.0 * args.minutes)

    monkeypatch.setattr(gpu, "_start", start)
    monkeypatch.setattr(gpu, "detect_gpus", lambda: ["one"])
    code = gpu.main(["--only", ",".join(does), "--out", str(out), "--minutes", "0.1"])
    files = {name: list(out.glob(f"gpu-{name}-20??-??-??.json")) for name in does}
    return code, {name: json.loads(file.read_text(encoding="utf-8")) for name, (file,) in files.items()}


def test_main_exits_with_0_if_parts_pass_or_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = run_fake(monkeypatch, tmp_path, {"parity": "ok", "peers": "skipped"})
    assert code == 0
    assert {name: one["status"] for name, one in found.items()} == {"parity": "ok", "peers": "skipped"}
    assert found["parity"]["part"] == "parity"
    assert found["parity"]["rehearsal"] is False
    assert set(found["parity"]["environment"]) >= {"command", "date", "packages", "gpus"}
    table = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split()[:2] for line in table] == [["parity", "ok"], ["peers", "skipped"]]


def test_main_exits_with_1_after_a_missed_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_fake(monkeypatch, tmp_path, {"loss": "missed"})[0] == 1


def test_main_keeps_other_parts_and_findings_after_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, found = run_fake(monkeypatch, tmp_path, {"parity": "crash", "loss": "ok"})
    assert code == 1
    assert found["loss"]["status"] == "ok"
    crashed = found["parity"]
    assert (crashed["status"], crashed["reason"]) == ("failed", "its process ended with code 7")
    assert crashed["figures"] == {"found": 1}
    assert crashed["log_end"] == "the last words\n"


def test_main_ends_a_hanging_part_and_keeps_its_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, found = run_fake(monkeypatch, tmp_path, {"parity": "hang"})
    assert code == 1
    assert (found["parity"]["status"], found["parity"]["lines"]) == ("failed", ["so far"])
    assert found["parity"]["reason"].endswith("its time was over")


def test_table_shows_the_reason(tmp_path: Path) -> None:
    bars = {"MFU": {"value": 0.5, "at_least": 0.55, "verdict": "missed"}}
    one = {"status": "missed", "reason": "", "bars": bars, "lines": ["a line"], "seconds": 12.34}
    lines = gpu.table({"mfu-1.8b": one})
    assert lines == [
        "mfu-1.8b    missed      12.3 s  MFU 0.5 (at least 0.55: missed)",
        "    MFU 0.5 (at least 0.55: missed)",
        "    a line",
    ]
    failed = {**one, "status": "failed", "reason": "first\nsecond", "seconds": 1.0}
    assert gpu.table({"parity": failed}, bars=False) == ["parity      failed       1.0 s  first"]


def test_run_here_reports_the_error_of_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Part) -> None:
        raise ZeroDivisionError("by what?")

    monkeypatch.setattr("benchmarks.gpu_parts.startup.startup", broken)
    assert gpu.main(["--rehearse", "--part", "startup", "--json", str(tmp_path)]) == 0
    found = read_json(tmp_path / "startup.json")
    assert found is not None
    assert (found["status"], found["reason"]) == ("failed", "ZeroDivisionError: by what?")


# All of it


@pytest.mark.rehearsal
@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.timeout(900)  # a first start builds DeepSpeed's operators
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

    for name, count in (("mfu-1.8b", 2), ("mfu-gpt2", 4), ("planner", 6), ("a6000", 1)):
        cases = [Trained(**case) for case in found[name]["figures"]["cases"]]
        assert len(cases) == count
        for case in cases:
            steps = 4 if name == "planner" else 2
            assert (case.steps, case.step_tokens, case.micro_batch * case.accumulation) == (steps, 64, 4)
            assert case.loss == pytest.approx(6.24, abs=0.1)  # untrained, on random tokens: ln 512
            assert case.tokens_per_s["min"] <= case.tokens_per_s["median"] <= case.tokens_per_s["max"]
            assert 0.0 < case.outside_ratio < 1.0
            assert case.mfu is case.peak_gib is case.predicted_tokens_per_s is None
            assert case.predicted_gib is not None
            assert 0.0 < case.predicted_gib < 0.1
    kernels = [" ".join(case["notes"]) for case in found["planner"]["figures"]["cases"]]
    assert ["activation_checkpointing: full" in notes for notes in kernels] == [False] * 5 + [True]
    assert set(found["parity"]["bars"]) == {
        "gradients, llama, fp32",
        "gradients, llama, bf16",
        "tensors twice as far off as eager, llama, fp32",
        "tensors twice as far off as eager, llama, bf16",
        "updates of the optimizers",
    }
    assert set(found["packing"]["figures"]["packing"]) == {"llama, sdpa", "gpt2, sdpa"}
    assert len(found["packing"]["bars"]) == 2 * 5
    assert found["resume"]["figures"]["final weights bit-equal"] is True
    assert set(found["loss"]["figures"]["losses"]) == {"chunked, compiled", "chunked", "plain"}
    assert list(found["engine-tax"]["figures"]["side by side"]["subjects"]) == list(ratios.TAX_SUBJECTS)
    assert os.environ.get("RANK") is None
