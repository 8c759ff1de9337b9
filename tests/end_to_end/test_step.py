"""Inside a step of the real engine: accumulation is exact, no waits for the device, no recompilation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def drive(launch: Callable[..., str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def run(*words: str) -> dict[str, Any]:
        launch("tests/end_to_end/drive_engine.py", str(tmp_path / "engine.json"), *words)
        found: dict[str, Any] = json.loads((tmp_path / "engine.json").read_text())
        return found

    return run


@pytest.mark.timeout(300)
def test_step_is_exact_and_free_of_waits(drive: Callable[..., dict[str, Any]]) -> None:
    found = drive()
    losses = {}
    for kind in ("whole", "padded", "documents"):
        whole, *cut = [step for step in found["accumulation"] if step["kind"] == kind]
        gradient = np.array(whole["gradient"])
        for step in cut:
            assert step["loss"] == pytest.approx(whole["loss"], rel=1e-6)
            error = np.linalg.norm(np.array(step["gradient"]) - gradient)
            assert error <= 1e-6 * np.linalg.norm(gradient), (kind, step["size"])
        losses[kind] = whole["loss"]
    assert len(set(losses.values())) == 3, "padding and first tokens of documents do not count"

    for eager in found["eager"]:
        assert (eager["micro_steps"], eager["counter_sees"]) == (60, 1)
        assert eager["operators"] > 60 * 100
        assert eager["syncs"] == 0


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_step_is_compiled_once(drive: Callable[..., dict[str, Any]]) -> None:
    windows, documents = drive("--compiled")["compiled"]
    for compiled in (windows, documents):
        assert compiled["graphs"] >= 2, "blocks and loss"
        assert (compiled["recompiled"], compiled["graph_breaks"]) == (0, 0)
    assert documents["graphs"] > windows["graphs"], "blocks that take a mask are another graph"
