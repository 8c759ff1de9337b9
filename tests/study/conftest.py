import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from inheritune_ds.study import processes, runner
from tests.study.bench import RANK, SUMMARY


@pytest.fixture(autouse=True)
def _default_port_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the expected commands independent of other runs on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        for module in (processes, runner):
            monkeypatch.setattr(module, "DEFAULT_PORT", probe.getsockname()[1])


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a fake train.py; `bench`/NAME sets the behavior of run NAME."""
    bench = tmp_path / "bench"
    text = {"windows": 2, "seq_len": 4, "tokens_sha256": "a" * 64}
    pieces = {"windows": [0, 1], "documents": [0, 1], "tokens": [4, 4], "losses": [8.0, 12.0]}
    evaluation = {"format": 2, "step": 1, "loss": 2.5, "stderr": 0.5, **text, "pieces": pieces}
    row = {"step": 1, "train/tokens": 8, "val/loss": 2.5, "val/stderr": 0.5}
    (bench / "finished/eval").mkdir(parents=True)
    (bench / "finished/run.json").write_text(json.dumps(SUMMARY))
    (bench / "finished/eval/validation-step-00000001.json").write_text(json.dumps(evaluation))
    (bench / "finished/metrics.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "train.py").write_text(RANK.format(bench=str(bench)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "__file__", str(tmp_path / "inheritune_ds/study/runner.py"))
    monkeypatch.setattr(runner, "_deepspeed", lambda: "deepspeed")
    return bench


@pytest.fixture
def when_ready(bench: Path) -> Callable[[Callable[[], None]], threading.Thread]:
    """Call a function in another thread as soon as the rank trains."""

    def after(action: Callable[[], None]) -> threading.Thread:
        def wait_and_act() -> None:
            deadline = time.monotonic() + 20
            while not (bench / "ready").exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            action()

        thread = threading.Thread(target=wait_and_act)
        thread.start()
        return thread

    return after
