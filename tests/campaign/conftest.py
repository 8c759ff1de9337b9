"""The campaign's launches under torchrun, forked instead."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.campaign import faults, resumes
from tests.launching import launch
from tests.warm_python import WarmPython


@pytest.fixture
def forked(warm: WarmPython, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run_to_end` of the parts that drive ranks of their own."""

    def run_to_end(folder: Path, *words: str, script: str, launcher: str, **how: Any) -> str:
        assert launcher == "torchrun"
        return launch(warm, folder, script, *words, **how)

    for module in (faults, resumes):
        monkeypatch.setattr(module, "run_to_end", run_to_end)
