import argparse
import json
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu_parts import ratios, throughput
from benchmarks.gpu_parts.case import Case, Cases, Trained
from benchmarks.gpu_parts.part import Part
from benchmarks.gpu_parts.report import Report, bar_words
from benchmarks.gpu_parts.watchdog import Start, watch
from benchmarks.side_by_side import Measured, Setting
from benchmarks.subjects.process import Block
from inheritune_ds.errors import MachineError
from inheritune_ds.files import read_json


def part_in(folder: Path, *, rehearse: bool, left_s: float = 1000.0) -> Part:
    report = Report(folder / "report.json", rehearsal=rehearse)
    return Part(rehearse, None, folder, time.monotonic() + left_s, report)


def told(folder: Path) -> dict[str, Any]:
    found = read_json(folder / "report.json")
    assert isinstance(found, dict)
    return found


# The report of a part


def test_report_is_on_the_disk_before_the_part_ends(tmp_path: Path) -> None:
    report = Report(tmp_path / "report.json", rehearsal=False)
    assert told(tmp_path)["status"] == "running"
    report.figure("tokens_per_s", 3)
    report.bar("MFU", 0.56, at_least=0.55)
    report.line("a line")
    found = told(tmp_path)
    assert (found["figures"], found["lines"]) == ({"tokens_per_s": 3}, ["a line"])
    assert found["bars"] == {"MFU": {"value": 0.56, "at_least": 0.55, "verdict": "met"}}
    report.end()
    assert told(tmp_path)["status"] == "ok"


@pytest.mark.parametrize(
    ("value", "limit", "verdict"),
    [
        (0.55, {"at_least": 0.55}, "met"),
        (0.54, {"at_least": 0.55}, "missed"),
        (1.03, {"at_most": 1.03}, "met"),
        (1.04, {"at_most": 1.03}, "missed"),
        (None, {"at_most": 1.03}, "not judged"),
    ],
)
def test_bar_is_judged(tmp_path: Path, value: float | None, limit: dict[str, Any], verdict: str) -> None:
    report = Report(tmp_path / "report.json", rehearsal=False)
    report.bar("it", value, **limit)
    report.end()
    found = told(tmp_path)
    assert found["bars"]["it"]["verdict"] == verdict
    assert found["status"] == ("missed" if verdict == "missed" else "ok")


def test_rehearsal_judges_what_is_not_of_a_gpu_alone(tmp_path: Path) -> None:
    report = Report(tmp_path / "report.json", rehearsal=True)
    report.bar("speed", 0.0, at_least=1.0)
    report.bar("exactness", 2.0, at_most=1.0, of_gpu=False)
    assert [bar["verdict"] for bar in told(tmp_path)["bars"].values()] == ["not judged", "missed"]


def test_failure_and_skipping_outlive_the_end(tmp_path: Path) -> None:
    for say, status in ((Report.fail, "failed"), (Report.skip, "skipped")):
        report = Report(tmp_path / "report.json", rehearsal=False)
        say(report, "why")
        report.end()
        assert (told(tmp_path)["status"], told(tmp_path)["reason"]) == (status, "why")


def test_bar_in_words() -> None:
    assert bar_words("MFU", {"value": 0.5712, "at_least": 0.55, "verdict": "met"}) == "MFU 0.5712 (at least 0.55: met)"
    found = bar_words("tax", {"value": None, "at_most": 1.03, "verdict": "not judged"})
    assert found == "tax unknown (at most 1.03: not judged)"


# The watchdog


def python(code: str, folder: Path, *, limit_s: float = 60.0) -> Start:
    return Start([sys.executable, "-c", textwrap.dedent(code)], {}, folder / "log", limit_s)


def is_running(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_watchdog_tells_how_a_process_ended(tmp_path: Path) -> None:
    well, badly = watch([python("pass", tmp_path), python("raise SystemExit(3)", tmp_path)])
    assert (well.code, badly.code) == (0, 3)
    assert badly.words == "its process ended with code 3"


def test_watchdog_ends_a_process_and_what_it_has_started_in_another_session(tmp_path: Path) -> None:
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


def test_watchdog_ends_what_a_process_leaves_running(tmp_path: Path) -> None:
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


def test_names_come_in_the_order_of_value() -> None:
    assert gpu.names("loss,parity") == ["parity", "loss"]
    with pytest.raises(argparse.ArgumentTypeError, match=r"no part: speed; there are parity, mfu-1\.8b"):
        gpu.names("parity,speed")


@pytest.mark.parametrize("text", ["0", "-1", "many", "nan", "inf"])
def test_minutes_are_above_zero(text: str) -> None:
    assert gpu.minutes("0.5") == 0.5
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number of minutes above 0"):
        gpu.minutes(text)


def test_list_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(gpu.PARTS)


def test_without_a_gpu_it_ends_with_10(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "detect_gpus", list)
    assert gpu.main([]) == MachineError.exit_code == 10
    told = capsys.readouterr().err
    assert told.startswith("gpu: error: nvidia-smi reports no GPU: nothing was checked")
    assert "do: give --rehearse" in told


def test_a_checkout_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    """The command on a machine with a GPU, whose parts do what they are told."""

    def start(args: argparse.Namespace, group: list[str], scratch: Path) -> Start:
        code = FAKE.format(folder=str(scratch), group=group, does=does)
        return Start([sys.executable, "-c", code], {}, scratch / "log", 60.0 * args.minutes)

    monkeypatch.setattr(gpu, "_start", start)
    monkeypatch.setattr(gpu, "detect_gpus", lambda: ["one"])
    code = gpu.main(["--only", ",".join(does), "--out", str(out), "--minutes", "0.1"])
    files = {name: list(out.glob(f"gpu-{name}-20??-??-??.json")) for name in does}
    return code, {name: json.loads(file.read_text(encoding="utf-8")) for name, (file,) in files.items()}


def test_all_well_is_0_and_skipping_is_no_fault(
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


def test_a_missed_bar_is_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_fake(monkeypatch, tmp_path, {"loss": "missed"})[0] == 1


def test_a_crash_harms_no_other_part_and_keeps_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, found = run_fake(monkeypatch, tmp_path, {"parity": "crash", "loss": "ok"})
    assert code == 1
    assert found["loss"]["status"] == "ok"
    crashed = found["parity"]
    assert (crashed["status"], crashed["reason"]) == ("failed", "its process ended with code 7")
    assert crashed["figures"] == {"found": 1}
    assert crashed["log_end"] == "the last words\n"


def test_a_part_that_hangs_is_ended_and_keeps_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, found = run_fake(monkeypatch, tmp_path, {"parity": "hang"})
    assert code == 1
    assert (found["parity"]["status"], found["parity"]["lines"]) == ("failed", ["so far"])
    assert found["parity"]["reason"].endswith("its time was over")


def test_table_says_why(tmp_path: Path) -> None:
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


def test_error_of_a_part_is_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Part) -> None:
        raise ZeroDivisionError("by what?")

    monkeypatch.setattr("benchmarks.gpu_parts.startup.startup", broken)
    assert gpu.main(["--rehearse", "--part", "startup", "--json", str(tmp_path)]) == 0
    found = read_json(tmp_path / "startup.json")
    assert found is not None
    assert (found["status"], found["reason"]) == ("failed", "ZeroDivisionError: by what?")


# What the parts make of what they measure


def trained(name: str, micro_batch: int, rate: float, **more: Any) -> Trained:
    rates = {"median": rate, "min": rate, "max": rate}
    return Trained(name, micro_batch, 64 // micro_batch, 1, tokens_per_s=rates, steps=20, step_tokens=1, **more)


def answers(monkeypatch: pytest.MonkeyPatch, found: dict[str, Trained | None]) -> list[Case]:
    """Cases are not run; each has the answer given here."""
    asked: list[Case] = []

    def measure(_: Cases, case: Case, *, apart: bool = False) -> Trained | None:
        asked.append(case)
        return found[case.name]

    monkeypatch.setattr(Cases, "measure", measure)
    monkeypatch.setattr(throughput, "usable_gib", lambda _: 133.0)
    return asked


def test_sweep_halves_the_planners_micro_batch_and_judges_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = throughput.TARGET
    asked = answers(
        monkeypatch,
        {
            name: trained(name, 32, 0.0, out_of_memory="CUDA out of memory"),
            f"{name}-x16": trained(f"{name}-x16", 16, 50.0, mfu=0.57, syncs_per_micro_step=0),
            f"{name}-x8": trained(f"{name}-x8", 8, 40.0, mfu=0.45, syncs_per_micro_step=0),
        },
    )
    part = part_in(tmp_path, rehearse=False)
    throughput.mfu_target(part)
    assert [case.micro_batch for case in asked] == ["auto", 16, 8]
    assert {case.step_windows * case.shape["max_position_embeddings"] for case in asked} == {131_072}
    bars = told(tmp_path)["bars"]
    assert bars[f"{name} MFU"] == {"value": 0.57, "at_least": 0.55, "verdict": "met"}
    assert told(tmp_path)["figures"] == {f"best micro-batch of {name}": 16}


def test_sweep_goes_on_after_a_case_without_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = throughput.TARGET
    found = {f"{name}-x{size}": trained(name, size, 10.0) for size in (8, 4)}
    answers(monkeypatch, {name: None, **found})
    throughput.mfu_target(part_in(tmp_path, rehearse=False))
    report = told(tmp_path)
    assert report["figures"] == {f"best micro-batch of {name}": 8}
    assert report["bars"][f"{name} MFU"]["verdict"] == "not judged"
    assert report["lines"][0] == f"{name}: no MFU, the peak of this GPU is not known (inheritune_ds/gpus.py)"


def test_sweep_without_any_rate_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = throughput.TARGET
    full = {case: trained(case, 16, 0.0, out_of_memory="full") for case in (name, f"{name}-x8", f"{name}-x4")}
    answers(monkeypatch, dict(full))
    throughput.mfu_target(part_in(tmp_path, rehearse=False))
    assert told(tmp_path)["status"] == "failed"
    assert told(tmp_path)["reason"] == f"no micro-batch that was tried has a rate: {name}"


def test_targets_have_the_papers_sizes() -> None:
    from inheritune_ds.budget import flops_per_token, parameters
    from inheritune_ds.recipe import Shape

    found = {}
    for name in throughput.BARS:
        shape = Shape.model_validate(throughput.shape_of(name))
        count = parameters(shape).total
        found[name] = round(count / 1e9, 3), shape.max_position_embeddings
        assert flops_per_token(shape, shape.num_hidden_layers, found[name][1]) > 6 * 0.9 * count
    assert found == {"llama-1.8b-13l": (1.816, 2048), "gpt2-medium-16l": (0.254, 1024), "gpt2-large-18l": (0.420, 1024)}


def test_case_without_a_result_fails_the_part_and_no_other_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    part = part_in(tmp_path, rehearse=False)
    case = Case(name="tiny", shape={}, step_windows=1, micro_batch=1, device="cpu")
    assert Cases(part).measure(case) is None
    assert told(tmp_path)["reason"].startswith("the case tiny ended without a result; the end of what it printed")
    assert told(tmp_path)["lines"] == ["the case tiny ended without a result"]


def test_case_that_the_time_does_not_last_for_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = part_in(tmp_path, rehearse=False, left_s=0.5)
    cases = Cases(part)
    monkeypatch.setattr(cases, "_longest_s", 1.0)
    assert cases.measure(Case(name="tiny", shape={}, step_windows=1, micro_batch=1, device="cpu")) is None
    assert told(tmp_path)["lines"] == ["tiny: left out, 0 s are left of the part's time"]
    assert told(tmp_path)["status"] == "running"


def measured_by(rates: dict[str, float], asked: list[Setting], *, takes_s: float = 0.0) -> Any:
    def measure(setting: Setting) -> Measured:
        asked.append(setting)
        time.sleep(takes_s)
        first = {"first_step_s": 1.0, "versions": {}, "notes": []}
        blocks = {n: Block(1, setting.step_tokens / rates[n], 0.0, 0, None, 1.0) for n in setting.subjects}
        return Measured(setting, [[blocks] * 5], [dict.fromkeys(setting.subjects, first)])

    return measure


def test_engine_tax_is_judged_over_three_sets_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Setting] = []
    rates = {"plain_master_compiled": 104.0, "project_compiled": 100.0, "project_shipped": 140.0, "hf_trainer": 100.0}
    monkeypatch.setattr(ratios, "measure", measured_by(rates, asked))
    ratios.tax(part_in(tmp_path, rehearse=False))
    assert [setting.device for setting in asked] == ["cuda"] * 3
    bars = told(tmp_path)["bars"]
    assert bars["tax of project_compiled"] == {"value": pytest.approx(1.04), "at_most": 1.03, "verdict": "missed"}
    assert bars["project_shipped over hf_trainer"] == {"value": pytest.approx(1.4), "at_least": 1.3, "verdict": "met"}
    assert told(tmp_path)["figures"]["side by side"]["processes"] == 3


def test_sets_of_processes_end_with_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Setting] = []
    rates = dict.fromkeys(ratios.TAX_SUBJECTS, 100.0)
    monkeypatch.setattr(ratios, "measure", measured_by(rates, asked, takes_s=0.5))
    ratios.tax(part_in(tmp_path, rehearse=False, left_s=0.8))
    assert len(asked) == 1
    assert told(tmp_path)["lines"][0] == "1 of 3 sets of processes: the part's time lasts for no more"
    assert told(tmp_path)["bars"]["tax of project_compiled"]["verdict"] == "met"


def test_nanogpt_is_skipped_without_a_checkout(tmp_path: Path) -> None:
    ratios.nanogpt(part_in(tmp_path, rehearse=False))
    assert told(tmp_path)["status"] == "skipped"
    assert told(tmp_path)["reason"] == "no nanoGPT checkout was given (--nanogpt FOLDER)"


def test_nanogpt_is_judged_with_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Setting] = []
    monkeypatch.setattr(ratios, "measure", measured_by({"project_shipped": 106.0, "nanogpt": 100.0}, asked))
    part = Part(False, tmp_path, tmp_path, time.monotonic() + 1000.0, Report(tmp_path / "report.json", rehearsal=False))
    ratios.nanogpt(part)
    assert [setting.nanogpt for setting in asked] == [str(tmp_path)] * 3
    assert told(tmp_path)["bars"]["project_shipped over nanogpt"]["verdict"] == "met"


# All of it


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.timeout(900)  # a first start builds DeepSpeed's operators
def test_rehearsal_goes_through_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert found["resume"]["figures"]["final weights bit-equal"] is True
    assert set(found["loss"]["figures"]["losses"]) == {"chunked, compiled", "chunked", "plain"}
    assert list(found["engine-tax"]["figures"]["side by side"]["subjects"]) == list(ratios.TAX_SUBJECTS)
    assert os.environ.get("RANK") is None
