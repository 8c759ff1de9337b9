"""Recording the campaign's results, and the ranks of its short forms, forked instead of launched."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.campaign import faults, resumes
from benchmarks.campaign.results import Results
from benchmarks.record import RESULTS
from tests.launching import launch
from tests.warm_python import WarmPython


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--resume", action="store_true", help="skip the campaign's cases that passed with this code")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("resume", default=False):
        return
    results = Results(config.cache, RESULTS / "reliability.json")
    done = [item for item in items if item.get_closest_marker("campaign") and has_passed(results, item)]
    config.hook.pytest_deselected(items=done)
    items[:] = [item for item in items if item not in done]


def has_passed(results: Results, item: pytest.Item) -> bool:
    assert isinstance(item, pytest.Function)
    given: dict[str, Any] = item.callspec.params  # untyped in pytest
    return given["name"] in results.passed(given["part"])


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config) -> Results:
    return Results(pytestconfig.cache, RESULTS / "reliability.json")


@pytest.fixture
def forked(warm: WarmPython, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run_to_end` of the parts that drive ranks of their own."""

    def run_to_end(folder: Path, *words: str, script: str, launcher: str, ranks: int = 2, **how: Any) -> str:
        assert launcher == "torchrun"
        return launch(warm, folder, script, *words, ranks=ranks, **how)

    for module in (faults, resumes):
        monkeypatch.setattr(module, "run_to_end", run_to_end)
