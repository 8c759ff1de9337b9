"""The clock of a case, as it works on a GPU."""

import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_parts import throughput, training
from benchmarks.gpu_parts.case import Case, Trained
from inheritune_ds.errors import TrainingError


def metered(monkeypatch: pytest.MonkeyPatch, gpu: str, *, syncs: int, accumulation: int = 2) -> Trained:
    """A meter on a GPU that does nothing, through all steps of a case; `syncs` in each of its micro-steps.

    In a step there are also one implicit and one explicit synchronization.
    """

    def accelerator() -> None:
        torch.cuda.synchronize()

    case = Case(
        name="target",
        shape=throughput.shape_of(throughput.TARGET),
        step_windows=2,
        micro_batch=1,
        device="cuda",
        warmup_steps=2,
        blocks=3,
        block_steps=2,
    )
    modes: list[str] = []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 4 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    now = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    untouched = torch.cuda.synchronize
    meter = training._Meter(case, accumulation, 0.0)
    with suppress(training._DoneError):
        for step in range(1, 100):
            for _ in range(accumulation * syncs if modes == ["warn"] else 0):
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            if modes == ["warn"]:
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
                warnings.warn("something else", stacklevel=1)
                accelerator()
            meter.update(step, 10.0 - step, 0.0)
            meter.log(step, 0, {"perf/outside_ratio": step / 100, "perf/data_wait_ratio": 0.0})
    assert step == 10
    meter.close()
    assert modes == ["warn", "default"]
    assert torch.cuda.synchronize is untouched
    return meter.result(Trained("target", 1, accumulation, 1, step_tokens=4096))


def test_meter_times_whole_blocks_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    found = metered(monkeypatch, "NVIDIA RTX A6000", syncs=0)
    assert found.tokens_per_s == {"median": 8192.0, "min": 8192.0, "max": 8192.0}  # two steps of 4096 in a "second"
    assert (found.steps, found.loss) == (6, 0.0)  # two steps more count the synchronizations
    assert (found.peak_gib, found.reserved_gib) == (3.0, 4.0)
    assert found.outside_ratio == pytest.approx(0.055)  # median of steps 3 to 8
    assert found.mfu == pytest.approx(8192 * 11.30e9 / 154.8e12, rel=1e-3)


def test_meter_separates_syncs_of_micro_steps_from_those_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    once = metered(monkeypatch, "NVIDIA RTX A6000", syncs=0)
    assert once.syncs is not None
    assert (list(once.syncs.values()), once.syncs_per_micro_step) == ([1.0, 1.0], 0)
    often = metered(monkeypatch, "NVIDIA RTX A6000", syncs=3)
    assert often.syncs is not None
    assert (sorted(often.syncs.values()), often.syncs_per_micro_step) == ([1.0, 1.0, 6.0], 3)
    one_micro_step = metered(monkeypatch, "NVIDIA RTX A6000", syncs=0, accumulation=1)
    assert (one_micro_step.syncs, one_micro_step.syncs_per_micro_step) == (once.syncs, None)


def test_meter_has_no_mfu_for_an_unknown_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert metered(monkeypatch, "NVIDIA GeForce GT 710", syncs=0).mfu is None


def test_meter_refuses_a_rate_above_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "flops_per_token", lambda *_: 1e12)
    with pytest.raises(TrainingError, match="the measurement is wrong"):
        metered(monkeypatch, "NVIDIA RTX A6000", syncs=0)


def test_out_of_memory_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Trained:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore than there is")

    monkeypatch.setattr(training, "_train", full)
    shape = throughput.shape_of(throughput.TARGET)
    case = Case(name="x", shape=shape, step_windows=4, micro_batch=2, device="cpu", ds_config="a6000.json")
    found = training.run_case(case, tmp_path)
    assert found.out_of_memory == "CUDA out of memory. Tried to allocate"
    assert (found.micro_batch, found.accumulation) == (2, 2)
    assert found.words() == "x: micro-batch 2 x 2: out of memory"
    assert found.predicted_gib == pytest.approx(39.1, abs=0.5)
