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
    launch("tests/end_to_end/drive_engine.py", str(out), launcher="python")
    found: dict[str, Any] = json.loads(out.read_text())

    for padded in (False, True):
        whole, *cut = [step for step in found["accumulation"] if step["padded"] is padded]
        gradient = np.array(whole["gradient"])
        for step in cut:
            assert step["loss"] == pytest.approx(whole["loss"], rel=1e-6)
            assert np.linalg.norm(np.array(step["gradient"]) - gradient) <= 1e-6 * np.linalg.norm(gradient), step[
                "size"
            ]
    losses = {step["padded"]: step["loss"] for step in found["accumulation"]}
    assert losses[True] != losses[False], "padding is not counted"

    eager, compiled = found["eager"], found["compiled"]
    assert (eager["micro_steps"], eager["counter_sees"]) == (60, 1)
    assert eager["operators"] > 60 * 100
    assert eager["syncs"] == 0
    assert compiled["graphs"] >= 2, "blocks and loss"
    assert (compiled["recompiled"], compiled["graph_breaks"]) == (0, 0)
