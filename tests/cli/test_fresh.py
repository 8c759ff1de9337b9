"""`train --fresh` and the deterministic mode, without the run itself."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from inheritune_ds.cli import main
from inheritune_ds.distributed.signals import StopSignal
from inheritune_ds.plan import micro_batch
from inheritune_ds.run import execute
from inheritune_ds.run.folder import RunFolder
from inheritune_ds.training import determinism

CPU = str(Path(__file__).parents[2] / "ds_configs" / "cpu.json")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """The value of --fresh that the run would get; environment and signals are not changed."""
    seen: list[bool] = []
    for name in ("install", "leave_from_anywhere"):
        monkeypatch.setattr(StopSignal, name, lambda _: None)
    monkeypatch.setattr(execute, "execute", lambda _recipe, _resolved, _launch, *, fresh: seen.append(fresh))
    monkeypatch.setattr(RunFolder, "has_finished", lambda *_: True)
    with patch.dict(os.environ):
        for name in ("RANK", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
            os.environ.pop(name, None)
        yield seen


def train(tmp_path: Path, *words: str, config: str = CPU) -> int:
    folders: list[Any] = ["--runs-dir", tmp_path / "runs", "--cache-dir", tmp_path / "cache"]
    return main(["train", "--recipe", "quickstart", "--deepspeed_config", config, *map(str, folders), *words])


def test_fresh_starts_over_where_a_run_has_finished(tmp_path: Path, launched: list[bool]) -> None:
    assert train(tmp_path) == 0
    assert train(tmp_path, "--fresh", "--dry-run") == 0
    assert launched == []
    assert train(tmp_path, "--fresh") == 0
    assert launched == [True]


def test_launch_resolves_its_config_and_its_target_once(tmp_path: Path, launched: list[bool]) -> None:
    names = ("target_shape", "resolve", "fit")
    with ExitStack() as stack:
        watched = [
            stack.enter_context(patch.object(micro_batch, name, wraps=getattr(micro_batch, name))) for name in names
        ]
        assert train(tmp_path, "--fresh") == 0
    assert launched == [True]
    assert [function.call_count for function in watched] == [1, 1, 1]


def test_deterministic_mode_is_entered_before_the_run(
    tmp_path: Path, launched: list[bool], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entered: list[list[bool]] = []
    monkeypatch.setattr(determinism, "compute_deterministically", lambda _: entered.append([*launched]))
    config = tmp_path / "ds.json"
    config.write_text('{"kernels": {"deterministic": true}}')
    assert train(tmp_path, "--dry-run", config=str(config)) == 0
    printed = capsys.readouterr().out
    assert '"deterministic": true' in printed
    assert "kernels.deterministic: on (the same bits in every run on the same GPUs, at less speed)" in printed
    assert train(tmp_path, "--fresh") == 0
    assert (entered, launched) == ([], [True])
    assert train(tmp_path, "--fresh", config=str(config)) == 0
    assert (entered, launched) == ([[True]], [True, True])


@pytest.mark.parametrize("name", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_restart_ignores_fresh(
    name: str, tmp_path: Path, launched: list[bool], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "2")
    assert train(tmp_path, "--fresh") == 0
    assert launched == []  # it has finished
    out = capsys.readouterr().out
    assert f"--fresh is ignored: this is restart 2 ({name}), which resumes the run" in out
    assert "quickstart: finished before" in out
    monkeypatch.setenv(name, "0")
    assert train(tmp_path, "--fresh") == 0
    assert launched == [True]
