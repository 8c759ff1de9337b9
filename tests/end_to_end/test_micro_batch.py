"""`--auto-micro-batch` through the whole flow: tried with real steps, taken, written down, kept."""

import json
from pathlib import Path

import pytest

from tests.end_to_end.test_runs import Launch, Recipe, arguments


@pytest.mark.timeout(300)
def test_largest_micro_batch_is_tried_taken_and_written_down(
    launch: Launch, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = tiny_recipe("tried")
    document = json.loads(recipe.read_text())["training"]
    windows = document["global_batch_tokens"] // document["seq_len"]
    output = launch("train.py", *arguments(recipe, tmp_path, "runs", "--auto-micro-batch"))
    run = tmp_path / "runs" / "tried"
    assert "micro-batch 1: peak" in output
    assert f"train_micro_batch_size_per_gpu: {windows} (the largest below" in output
    assert json.loads((run / "micro_batch.json").read_text())["train_micro_batch_size_per_gpu"] == windows
    resolved = json.loads((run / "ds_config.resolved.json").read_text())
    assert (resolved["train_micro_batch_size_per_gpu"], resolved["gradient_accumulation_steps"]) == (windows, 1)
    assert resolved["kernels"] == json.loads((run / "kernels.json").read_text())
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
