"""The disk space that a run requires before it trains, and its single RunData."""

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from inheritune_ds.cli import main
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.data.tokens.token_set import TokenSet
from inheritune_ds.distributed.signals import StopSignal
from inheritune_ds.errors import StorageError
from inheritune_ds.run import prepare
from inheritune_ds.run.data import RunData
from inheritune_ds.surgery.inherit import TargetModel
from tests.run.tokens import token_set

CPU = str(Path(__file__).parents[2] / "ds_configs" / "cpu.json")


def asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str, there: int = 0) -> int:
    """The number of checkpoints that a run of 30 steps requires space for, without its preparation."""
    asked: list[int] = []

    def refuse(_folder: Path, _bytes: int, *, count: int) -> None:
        asked.append(count)
        raise StorageError("no room")

    def prepare_tokens(*_: Any) -> tuple[TokenSet, str]:
        for step in range(1, there + 1):
            (tmp_path / "runs" / "quickstart-reference" / "checkpoints" / f"step-{step:08d}").mkdir()
        return token_set(tmp_path, {"embedded": 100_000}, {}), "f"

    monkeypatch.setattr(prepare, "require_space", refuse)
    monkeypatch.setattr(prepare, "_prepare_tokens", prepare_tokens)
    monkeypatch.setattr(prepare, "_prepare_target", lambda *_: TargetModel(tmp_path, {"parameters": 1000}))
    for name in ("install", "leave_from_anywhere"):
        monkeypatch.setattr(StopSignal, name, lambda _: None)
    words = ["train", "--recipe", "quickstart-reference", "--deepspeed_config", CPU]
    words += ["--runs-dir", str(tmp_path / "runs"), "--cache-dir", str(tmp_path / "cache")]
    with patch.dict(os.environ):
        code = main([*words, "training.duration=30 steps", "checkpoint.interval_steps=10", *overrides])
    assert code == StorageError.exit_code
    return asked[0]


@pytest.mark.parametrize(
    ("overrides", "there", "count"),
    [
        (["checkpoint.keep=1"], 0, 3),
        (["checkpoint.keep=100000"], 0, 5),
        (["checkpoint.keep=1", "checkpoint.keep_every=1"], 0, 5),
        (["checkpoint.keep=1", "checkpoint.keep_every=1"], 2, 3),
        (["checkpoint.keep=1"], 3, 2),
    ],
    ids=["keep", "keep more than are saved", "keep all", "some exist", "more exist than are kept"],
)
def test_run_requires_space_for_its_missing_checkpoints(
    overrides: list[str], there: int, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asked_for(tmp_path, monkeypatch, *overrides, there=there) == count


def test_data_of_a_run_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Recipe] = []

    class Counted(RunData):
        def __init__(self, recipe: Recipe, tokens: TokenSet) -> None:
            made.append(recipe)
            super().__init__(recipe, tokens)

    monkeypatch.setattr(prepare, "RunData", Counted)
    asked_for(tmp_path, monkeypatch)
    assert len(made) == 1
