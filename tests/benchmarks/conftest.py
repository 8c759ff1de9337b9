"""Rehearsals: a benchmark at toy size, started as a user does."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inheritune_ds.storage.files import read_json
from tests.launching import ROOT, environment

Rehearse = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def rehearse(tmp_path: Path) -> Rehearse:
    """Runs `python -m benchmarks.NAME --rehearse` with an empty folder as scratch; returns its JSON and its output."""

    def run(name: str, *words: str) -> tuple[dict[str, Any], str]:
        out = tmp_path / f"{name}.json"
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}", "--rehearse", "--out", str(out), *words],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return read_json(out) or {}, done.stdout

    return run
