"""Inside a step of the real engine: accumulation is exact, nothing waits for the device, nothing is compiled again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.mark.timeout(300)
def test_step_is_exact_and_free_of_waits_and_recompilation(launch: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "engine.json"
    launch("tests/end_to_end/drive_engine.py", str(out))
    found: dict[str, Any] = json.loads(out.read_text())

    losses = {}
    for kind in ("whole", "padded", "documents"):
        whole, *cut = [step for step in found["accumulation"] if step["kind"] == kind]
        gradient = np.array(whole["gradient"])
        for step in cut:
            assert step["loss"] == pytest.approx(whole["loss"], rel=1e-6)
            error = np.linalg.norm(np.array(step["gradient"]) - gradient)
            assert error <= 1e-6 * np.linalg.norm(gradient), (kind, step["size"])
        losses[kind] = whole["loss"]
    assert len(set(losses.values())) == 3, "padding and first tokens of documents are not counted"

    for eager, compiled in zip(found["eager"], found["compiled"], strict=True):
        assert (eager["micro_steps"], eager["counter_sees"]) == (60, 1)
        assert eager["operators"] > 60 * 100
        assert eager["syncs"] == 0
        assert compiled["graphs"] >= 2, "blocks and loss"
        assert (compiled["recompiled"], compiled["graph_breaks"]) == (0, 0)
    windows, documents = found["compiled"]
    assert documents["graphs"] > windows["graphs"], "blocks that take a mask are another graph"
