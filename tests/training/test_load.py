"""A target that is loaded by partition: the same training as with a whole one, and the memory of the load."""

import json
from pathlib import Path

import pytest

from benchmarks.host_memory import LARGE, SMALL, write_target
from benchmarks.ranks import Case, on_ranks
from tests.launching import launch
from tests.training.drive_load import CASES
from tests.warm_python import WarmPython


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_a_partitioned_target_trains_bitwise_like_a_whole_one(ranks: int, warm: WarmPython, tmp_path: Path) -> None:
    launch(warm, tmp_path, "tests/training/drive_load.py", str(tmp_path), ranks=ranks)
    for rank in range(ranks):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        lacking = f"model.layers.1.mlp.up_proj.weight is in no file of {tmp_path / 'llama float32'}"
        assert found.pop("refused") == f"the config contradicts the weights:\n    {lacking}"
        assert len(found) == len(CASES)
        for case, run in found.items():
            assert run["partitioned"] == run["whole"], case
            assert run["whole"]["start"] != run["whole"]["masters"], "the steps change the model"
            assert run["whole"]["loss"] == "chunked"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_load_holds_the_share_of_the_rank_and_one_parameter(tmp_path: Path) -> None:
    """In bytes per parameter, in bf16; a rank that loads the whole model takes 4 for the load, and 7.5 in all."""
    ranks, case = 4, Case(**LARGE)
    write_target(tmp_path, case, "bfloat16")
    write_target(tmp_path / "small", Case(**SMALL), "bfloat16")
    arguments = {"folder": str(tmp_path), "case": {"stage": 3, **LARGE}}
    found = on_ranks("benchmarks.host_memory:measure", arguments, ranks)
    embedding = 2 * case.vocab_size * case.hidden_size / found["parameters"]
    assert found["load_bytes_per_parameter"] <= 2 / ranks + embedding + 0.1
    # DeepSpeed's weights, masters, gradients and a copy, and a parameter with the buffers to gather it.
    assert found["build_bytes_per_parameter"] <= (2 + 4 + 4 + 4) / ranks + 4 * embedding + 1.3
