"""The same recipe on 1, 2 and 4 ranks and under ZeRO 1, 2 and 3: same order, same losses; golden values hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.machine_kind import machine_kind

GOLDEN = Path(__file__).parent.parent / "golden" / "losses.json"
DRIVER = "tests/end_to_end/drive_steps.py"
Launch = Callable[..., str]


def drive(launch: Launch, folder: Path, stages: str, ranks: int, *, precision: str = "fp32") -> list[dict[str, Any]]:
    out = folder / f"out-{ranks}-{precision}.json"
    scratch = str(folder / f"scratch-{ranks}-{precision}")
    launch(DRIVER, str(out), stages, "50", precision, ranks=ranks, DRIVE_SCRATCH=scratch)
    return [json.loads(out.with_suffix(f".rank{rank}.json").read_text()) for rank in range(ranks)]


def steps_of(ranks: list[dict[str, Any]], label: str, validation_calls: int) -> list[set[int]]:
    """Windows of every optimizer step, over all ranks (the validation reads come first and last)."""
    reads = [run[label]["own_windows"][validation_calls:] for run in ranks]
    per_step = 16 // (2 * len(ranks))  # 512 tokens = 16 windows; micro-batches of 2
    return [
        {window for rank in reads for micro in rank[step * per_step : (step + 1) * per_step] for window in micro}
        for step in range(50)
    ]


def relative_gap(left: list[float], right: list[float]) -> float:
    assert len(left) == len(right) == 50
    return max(abs(a - b) / abs(a) for a, b in zip(left, right, strict=True))


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("alone", "together"),
    [
        ("1,2,3,1d", {2: "3,2d", 4: "1"}),
        pytest.param(
            "1,1,2,3,1d", {2: "1,2,3,1d,2d,3d", 4: "1,2,3"}, marks=[pytest.mark.thorough, pytest.mark.slow], id="all"
        ),
    ],
)
def test_ranks_and_stages_agree_on_order_and_losses(
    launch: Launch, tmp_path: Path, alone: str, together: dict[int, str]
) -> None:
    one_rank = drive(launch, tmp_path, alone, 1)[0]
    runs = {label.partition(":")[2]: run for label, run in one_rank.items()}
    base, apart = runs["zero1"]["losses"], runs["zero1d"]
    assert base[-1] < base[0] - 0.1, "the model learns, so equal losses mean something"
    repeats = [run for label, run in one_rank.items() if label.endswith(":zero1")]
    assert all(run == runs["zero1"] for run in repeats), "a repeat on one machine is exact"
    golden = json.loads(GOLDEN.read_text())
    same_machine = golden["machine"] == machine_kind()
    for label, recorded in golden["runs"].items():
        own = runs[label.partition(":")[2]]
        assert relative_gap(recorded["losses"], own["losses"]) <= 1e-5
        assert relative_gap(recorded["grad_norms"], own["grad_norms"]) <= 1e-3
        assert relative_gap(base, own["losses"]) <= 1e-5
        if same_machine:
            assert {key: own[key] for key in recorded} == recorded
    assert all(run["masters_exact"] for run in one_rank.values())
    order = steps_of([one_rank], "0:zero1", 6)
    assert all(len(step) == 16 for step in order)
    assert relative_gap(base, apart["losses"]) > 1e-3, "documents kept apart have other losses"
    for ranks, stages in together.items():
        results = drive(launch, tmp_path, stages, ranks)
        calls = {2: 3, 4: 2}[ranks]  # 16 validation windows over the ranks, 3 at a time
        for label, run in results[0].items():
            wanted = apart if label.endswith("d") else runs["zero1"]
            assert relative_gap(wanted["losses"], run["losses"]) <= 1e-5, (ranks, label)
            assert steps_of(results, label, calls) == order, (ranks, label)
            assert run["validation"] == pytest.approx(wanted["validation"], rel=1e-5)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("stages", ["1", pytest.param("2,3", marks=[pytest.mark.thorough, pytest.mark.slow])])
def test_bf16_starts_from_the_checkpoint_s_own_values_and_stays_near_fp32(
    launch: Launch, tmp_path: Path, stages: str
) -> None:
    fp32 = json.loads(GOLDEN.read_text())["runs"]["0:zero1"]["losses"]
    for label, run in drive(launch, tmp_path, stages, 2, precision="bf16")[0].items():
        assert run["masters_exact"], f"{label}: the fp32 masters are not bf16-rounded"
        # 8 bits of mantissa: each loss is near the fp32 one, and not equal to it.
        assert 0 < relative_gap(fp32, run["losses"]) < 5e-3, label
