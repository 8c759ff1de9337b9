import importlib
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_parts import capped, device, packing, predictions, ratios, resume, startup, throughput
from benchmarks.gpu_parts.case import Case, Cases, Trained
from benchmarks.gpu_parts.part import Part
from benchmarks.gpu_parts.report import Report
from benchmarks.packing import Setting as PackingSetting
from benchmarks.side_by_side import Measured, Setting
from benchmarks.subjects.process import Block
from inheritune_ds.errors import MachineError
from inheritune_ds.storage.files import read_json


def part_in(folder: Path, *, rehearse: bool, left_s: float = 1000.0) -> Part:
    report = Report(folder / "report.json", rehearsal=rehearse)
    return Part(rehearse, None, folder, time.monotonic() + left_s, report)


def findings(folder: Path) -> dict[str, Any]:
    found = read_json(folder / "report.json")
    assert isinstance(found, dict)
    return found


# The report of a part


def test_report_is_written_before_the_part_ends(tmp_path: Path) -> None:
    report = Report(tmp_path / "report.json", rehearsal=False)
    assert findings(tmp_path)["status"] == "running"
    report.figure("tokens_per_s", 3)
    report.bar("MFU", 0.56, at_least=0.55)
    report.line("a line")
    report.expect("one", "two", "three")
    report.done("one", "three")
    found = findings(tmp_path)
    assert (found["figures"], found["lines"]) == ({"tokens_per_s": 3}, ["a line"])
    assert found["missing"] == ["two"]
    assert found["bars"] == {"MFU": {"value": 0.56, "at_least": 0.55, "verdict": "met"}}
    report.end()
    assert findings(tmp_path)["status"] == "ok"


def test_report_keeps_the_keys_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"part": "loss", "status": "running", "missing": ["all"]}')
    Report(tmp_path / "report.json", rehearsal=False).end()
    found = findings(tmp_path)
    assert (found["part"], found["status"], found["missing"]) == ("loss", "ok", [])


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
def test_bar_compares_value_and_limit(tmp_path: Path, value: float | None, limit: dict[str, Any], verdict: str) -> None:
    report = Report(tmp_path / "report.json", rehearsal=False)
    report.bar("it", value, **limit)
    report.end()
    found = findings(tmp_path)
    assert found["bars"]["it"]["verdict"] == verdict
    assert found["status"] == ("missed" if verdict == "missed" else "ok")


def test_rehearsal_judges_only_bars_without_a_gpu(tmp_path: Path) -> None:
    report = Report(tmp_path / "report.json", rehearsal=True)
    report.bar("speed", 0.0, at_least=1.0)
    report.bar("exactness", 2.0, at_most=1.0, of_gpu=False)
    assert [bar["verdict"] for bar in findings(tmp_path)["bars"].values()] == ["not judged", "missed"]


def test_end_keeps_failure_and_skipping(tmp_path: Path) -> None:
    for say, status in ((Report.fail, "failed"), (Report.skip, "skipped")):
        report = Report(tmp_path / "report.json", rehearsal=False)
        say(report, "why")
        report.end()
        assert (findings(tmp_path)["status"], findings(tmp_path)["reason"]) == (status, "why")


# Results of the parts


@pytest.mark.parametrize("name", gpu.PARTS)
def test_a_part_announces_the_cases_that_its_length_is_estimated_from(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AnnouncedError(Exception):
        pass

    def expect(_: Report, *cases: str) -> None:
        raise AnnouncedError(len(cases))

    monkeypatch.setattr(Report, "expect", expect)
    monkeypatch.setattr(throughput, "usable_gib", lambda _: 133.0)
    module, _, function = gpu.PARTS[name].where.partition(":")
    part = replace(part_in(tmp_path, rehearse=False), nanogpt=tmp_path)
    with pytest.raises(AnnouncedError) as raised:
        getattr(importlib.import_module(f"benchmarks.gpu_parts.{module}"), function)(part)
    assert raised.value.args == (gpu.PARTS[name].cases,)
    assert gpu.PARTS[name].compiled <= gpu.PARTS[name].cases


SMALL = SimpleNamespace(name="NVIDIA T400", memory_gib=4.0, compute_capability=(7, 5))


@pytest.mark.parametrize(
    ("reported", "verdicts"),
    [
        ([device._TOY], {"met"}),
        (
            [SimpleNamespace(name="NVIDIA T400", memory_gib=4.0, compute_capability=(7, 5)), device._TOY],
            {"met", "missed"},
        ),
    ],
)
def test_the_drivers_facts_are_compared_with_torchs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reported: list[Any], verdicts: set[str]
) -> None:
    monkeypatch.setattr(device, "detect_gpus", lambda: reported)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device._TOY_OF_TORCH)
    device.facts(part_in(tmp_path, rehearse=False))
    assert {bar["verdict"] for bar in findings(tmp_path)["bars"].values()} == verdicts
    assert findings(tmp_path)["missing"] == []


def test_documents_with_a_head_size_of_100_are_judged_by_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def times(setting: PackingSetting) -> dict[str, Any]:
        assert setting.shape["hidden_size"] // setting.shape["num_attention_heads"] == 100
        return {"ratio": {"median": 1.2}, "peak_gib": {"windows": 4.0, "documents": 9.0}}

    monkeypatch.setattr(packing, "times", times)
    packing.head_100(part_in(tmp_path, rehearse=False))
    (bar,) = findings(tmp_path)["bars"].values()
    assert bar == {"value": 2.25, "at_most": 1.25, "verdict": "missed"}


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
            f"{name}-over-1": trained(name, 32, 0.0, out_of_memory="CUDA out of memory"),
            f"{name}-over-2": trained(name, 16, 50.0, mfu=0.57, graphs=2),
            f"{name}-over-4": trained(name, 8, 40.0, mfu=0.45, graphs=2, syncs_per_micro_step=3),
        },
    )
    part = part_in(tmp_path, rehearse=False)
    throughput.mfu_target(part)
    assert [case.micro_batch for case in asked] == ["auto", 16, 8]
    assert {case.step_windows * case.shape["max_position_embeddings"] for case in asked} == {131_072}
    bars = findings(tmp_path)["bars"]
    assert bars[f"{name} MFU"] == {"value": 0.57, "at_least": 0.55, "verdict": "met"}
    assert bars[f"{name} graphs"]["verdict"] == "met"
    assert bars[f"{name} host syncs a micro-step"]["value"] == 3, "the case with accumulation tells"
    assert findings(tmp_path)["figures"] == {f"best micro-batch of {name}": 16}


def test_sweep_continues_after_a_case_without_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = throughput.TARGET
    found = {f"{name}-over-{divisor}": trained(name, 16 // divisor, 10.0) for divisor in (2, 4)}
    asked = answers(monkeypatch, {f"{name}-over-1": None, **found})
    throughput.mfu_target(part_in(tmp_path, rehearse=False))
    assert [case.micro_batch for case in asked] == ["auto", 8, 4]
    report = findings(tmp_path)
    assert report["figures"] == {f"best micro-batch of {name}": 8}
    assert report["bars"][f"{name} MFU"]["verdict"] == "not judged"
    assert report["lines"][0] == f"{name}: no MFU, the peak of this GPU is not known (inheritune_ds/plan/gpus.py)"


def test_sweep_without_any_rate_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = throughput.TARGET
    full = {f"{name}-over-{divisor}": trained(name, 16, 0.0, out_of_memory="full") for divisor in (1, 2, 4)}
    answers(monkeypatch, dict(full))
    throughput.mfu_target(part_in(tmp_path, rehearse=False))
    assert findings(tmp_path)["status"] == "failed"
    assert findings(tmp_path)["reason"] == f"no micro-batch that was tried has a rate: {name}"


def test_targets_have_the_papers_sizes() -> None:
    from inheritune_ds.config.model import Shape
    from inheritune_ds.plan.model_size import flops_per_token, parameters

    found = {}
    for name in throughput.BARS:
        shape = Shape.model_validate(throughput.shape_of(name))
        count = parameters(shape).total
        found[name] = round(count / 1e9, 3), shape.max_position_embeddings
        assert flops_per_token(shape, shape.num_hidden_layers, found[name][1]) > 6 * 0.9 * count
    assert found == {"llama-1.8b-13l": (1.816, 2048), "gpt2-medium-16l": (0.254, 1024), "gpt2-large-18l": (0.420, 1024)}


def test_predictions_are_compared_with_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(_: Cases, case: Case) -> Trained | None:
        if "bf16-sums" in case.name:
            return trained(case.name, 8, 0.0, out_of_memory="full", predicted_gib=57.5)
        asked[case.name] = case
        predicted = {"predicted_gib": 9.6, "predicted_tokens_per_s": 120.0}
        return trained(case.name, 8, 100.0, peak_gib=10.0, **predicted)

    asked: dict[str, Case] = {}
    monkeypatch.setattr(Cases, "measure", measure)
    monkeypatch.setattr(throughput, "usable_gib", lambda _: 133.0)
    predictions.llama(part_in(tmp_path, rehearse=False))
    report = findings(tmp_path)
    bars = report["bars"]
    assert report["reason"] == "llama-1.8b-13l x8 bf16 sums: out of memory, though 57.5 GiB were predicted"
    assert "llama-1.8b-13l x16 selective recomputation: memory error" in bars
    memory, speed = (bars[f"llama-1.8b-13l x8 shipped: {what} error"] for what in ("memory", "speed"))
    assert (memory["value"], memory["verdict"]) == (pytest.approx(0.04), "met")
    assert (speed["value"], speed["verdict"]) == (pytest.approx(0.2), "missed")
    predictions.gpt2(part_in(tmp_path, rehearse=False))
    report = findings(tmp_path)
    assert "gpt2-medium-16l x16 eager: memory error" in report["bars"]
    assert "gpt2-medium-16l x16 eager: speed error" not in report["bars"]  # a plan speaks of what is shipped
    assert asked["gpt2-medium-16l-x16-eager"].document == {"kernels": {"compile": False}}
    assert report["figures"]["relative errors"]["gpt2-large-18l x16 shipped"]["memory"] == pytest.approx(-0.04)


def test_capped_reports_the_micro_batches_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(_: Cases, case: Case, *, apart: bool = False) -> Trained:
        assert (case.cap_gib, case.ds_config) == (46.0, "a6000.json")
        full = {"fp32": 4, "bf16": 16}[case.document["data_types"]["grad_accum_dtype"]] if case.document else 100
        size = case.micro_batch if isinstance(case.micro_batch, int) else 2
        tried.append((case.name, apart))
        return replace(trained(case.name, size, 1.0, reserved_gib=45.0), steps=5, out_of_memory="x" * (size >= full))

    tried: list[tuple[str, bool]] = []
    monkeypatch.setattr(Cases, "measure", measure)
    monkeypatch.setattr(throughput, "usable_gib", lambda _: 133.0)
    capped.shipped(part_in(tmp_path, rehearse=False))
    assert {bar["verdict"] for bar in findings(tmp_path)["bars"].values()} == {"met"}
    capped.fit(part_in(tmp_path, rehearse=False))
    names = [
        "llama-1.8b-13l",
        *(
            f"{kind}-sums-x{size}"
            for kind, most in (("fp32", 4), ("bf16", 16))
            for size in (2, 4, 8, 16)
            if size <= most
        ),
    ]
    assert tried == [(name, name == names[0]) for name in names]
    assert findings(tmp_path)["figures"]["micro-batches that fit, by type of the gradient sums"] == {
        "fp32": {"2": True, "4": False},
        "bf16": {"2": True, "4": True, "8": True, "16": False},
    }


def test_failed_run_shows_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "train_command", lambda *_: [sys.executable, "-c", "raise SystemExit('no disk')"])
    for run, what in ((resume.resume, "the run straight did not end well"), (startup.startup, "no step was made")):
        with pytest.raises(MachineError) as raised:
            run(part_in(tmp_path, rehearse=True))
        assert raised.value.problem == f"{what}; the end of the log:\nno disk"
        (tmp_path / "train.log").unlink()


def test_case_without_a_result_fails_the_part_but_no_other_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    part = part_in(tmp_path, rehearse=False)
    case = Case(name="tiny", shape={}, step_windows=1, micro_batch=1, device="cpu")
    assert Cases(part).measure(case) is None
    assert findings(tmp_path)["reason"].startswith("the case tiny ended without a result; the end of its output")
    assert findings(tmp_path)["lines"] == ["the case tiny ended without a result"]


def test_case_without_enough_time_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = part_in(tmp_path, rehearse=False, left_s=0.5)
    cases = Cases(part)
    monkeypatch.setattr(cases, "_longest_s", 1.0)
    part.report.expect("tiny")
    assert cases.measure(Case(name="tiny", shape={}, step_windows=1, micro_batch=1, device="cpu")) is None
    assert findings(tmp_path)["lines"] == ["tiny: skipped, 0 s remain of the part's time"]
    assert (findings(tmp_path)["status"], findings(tmp_path)["missing"]) == ("running", ["tiny"])


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
    bars = findings(tmp_path)["bars"]
    assert bars["tax of project_compiled"] == {"value": pytest.approx(1.04), "at_most": 1.03, "verdict": "missed"}
    assert findings(tmp_path)["missing"] == []
    assert findings(tmp_path)["figures"]["side by side"]["processes"] == 3


def test_the_shipped_program_is_judged_over_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Setting] = []
    monkeypatch.setattr(ratios, "measure", measured_by({"project_shipped": 140.0, "hf_trainer": 100.0}, asked))
    ratios.trainer(part_in(tmp_path, rehearse=False))
    bars = findings(tmp_path)["bars"]
    assert bars["project_shipped over hf_trainer"] == {"value": pytest.approx(1.4), "at_least": 1.3, "verdict": "met"}


def test_sets_of_processes_end_with_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Setting] = []
    rates = dict.fromkeys(("plain_master_compiled", "project_compiled"), 100.0)
    monkeypatch.setattr(ratios, "measure", measured_by(rates, asked, takes_s=0.5))
    ratios.tax(part_in(tmp_path, rehearse=False, left_s=0.8))
    assert len(asked) == 1
    assert findings(tmp_path)["missing"] == ["set 2", "set 3"]
    assert findings(tmp_path)["lines"][0] == "1 of 3 sets of processes: the part's time lasts for no more"
    assert findings(tmp_path)["bars"]["tax of project_compiled"]["verdict"] == "met"


@pytest.mark.parametrize("given", [True, False])
def test_nanogpt_is_judged_if_a_checkout_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, given: bool
) -> None:
    asked: list[Setting] = []
    monkeypatch.setattr(ratios, "measure", measured_by({"project_shipped": 106.0, "nanogpt": 100.0}, asked))
    ratios.nanogpt(replace(part_in(tmp_path, rehearse=False), nanogpt=tmp_path if given else None))
    found = findings(tmp_path)
    if given:
        assert [setting.nanogpt for setting in asked] == [str(tmp_path)] * 3
        assert found["bars"]["project_shipped over nanogpt"]["verdict"] == "met"
    else:
        assert (found["status"], asked) == ("skipped", [])
        assert found["reason"] == "no nanoGPT checkout was given (--nanogpt FOLDER)"
