import pytest
import torch

from benchmarks.accumulation import error, exact, lines_of, mean_and_interval
from tests.benchmarks.conftest import Rehearse


def test_error_is_relative_to_the_whole_gradient() -> None:
    wanted = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    assert error(wanted, wanted) == 0.0
    assert error({**wanted, "a": torch.tensor([3.0, 0.5])}, wanted) == pytest.approx(0.1)


def test_mean_and_interval_returns_the_interval_of_the_mean() -> None:
    found = mean_and_interval([1.0, 2.0, 3.0, 2.0])
    low, high = found["interval_95"]
    assert found["mean"] == 2.0
    assert 1.0 < low < 2.0 < high < 3.0


def test_exact_returns_the_mean_over_micro_batches() -> None:
    one, two = (exact(0, [count], "cpu")[count] for count in (1, 2))
    both = exact(0, [1, 2], "cpu")
    name = "model.norm.weight"
    assert torch.equal(both[1][name], one[name])
    assert torch.equal(both[2][name], two[name])
    assert one[name].dtype == torch.float64
    assert not torch.equal(exact(1, [1], "cpu")[1][name], one[name]), "another seed, other tokens"


def test_lines_of_has_a_row_per_setting_and_a_column_per_accumulation() -> None:
    row = {"stage": 1, "dtype": "fp32", "communication": "bf16", "interval_95": [0.001, 0.003], "mean": 0.002}
    lines = lines_of([{**row, "accumulation": 1}, {**row, "accumulation": 4}])
    assert lines[0] == "| ZeRO | grad_accum_dtype | communicated in | 1 micro-batches | 4 micro-batches |"
    assert lines[2] == "| 1 | fp32 | bf16 | 0.200% (0.100% to 0.300%) | 0.200% (0.100% to 0.300%) |"


@pytest.mark.rehearsal
@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.timeout(300)  # a first start builds DeepSpeed's operators
def test_rehearsal_shows_the_rounding_of_bf16_passes_and_sums(rehearse: Rehearse) -> None:
    rows = rehearse("accumulation")[0]["rows"]
    found = {(row["dtype"], row["communication"], row["accumulation"]): row["mean"] for row in rows}
    assert 0.002 < found["fp32", "fp32", 1] < 0.01
    assert found["fp32", "bf16", 1] == found["bf16", "bf16", 1]  # nothing is added up
    assert found["fp32", "fp32", 4] < found["fp32", "bf16", 4] < found["bf16", "bf16", 4]
