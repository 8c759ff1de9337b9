import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from inheritune_ds.run.status import read_status, write_status


def test_status_is_read_back(tmp_path: Path) -> None:
    assert read_status(tmp_path) == {}
    start = datetime.now(UTC).replace(microsecond=0)
    write_status(tmp_path, "requeue", step=42, reason="SIGUSR1: saved", exit_code=0)
    status = read_status(tmp_path)
    assert {key: status[key] for key in ("state", "step", "reason", "exit_code", "pid")} == {
        "state": "requeue",
        "step": 42,
        "reason": "SIGUSR1: saved",
        "exit_code": 0,
        "pid": os.getpid(),
    }
    assert datetime.fromisoformat(status["time"]) >= start
    write_status(tmp_path, "running")
    assert (
        read_status(tmp_path)["state"],
        read_status(tmp_path)["step"],
        read_status(tmp_path)["reason"],
    ) == ("running", 0, "")


@pytest.mark.parametrize("content", ["3", '"x"', "[1]", "\x00\x00", '{"state'])
def test_invalid_status_is_empty(content: str, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(content)
    assert read_status(tmp_path) == {}
    write_status(tmp_path, "running", step=8)
    assert read_status(tmp_path)["step"] == 8


def test_status_keeps_the_largest_saved_step(tmp_path: Path) -> None:
    write_status(tmp_path, "running", step=8)
    write_status(tmp_path, "failed", step=0, reason="its checkpoints have gone", exit_code=4)
    assert (read_status(tmp_path)["step"], read_status(tmp_path)["saved_step"]) == (0, 8)
