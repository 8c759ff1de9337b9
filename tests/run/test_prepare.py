from pathlib import Path

import pytest

from inheritune_ds.config.loading import load_recipe
from inheritune_ds.run.data import RunData
from inheritune_ds.run.folder import RunFolder
from tests.conftest import Logged
from tests.run.tokens import token_set


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "checkpoints").mkdir()
    return RunFolder(tmp_path)


def test_the_log_says_how_much_is_validated_on_and_of_what(folder: RunFolder, logged: Logged) -> None:
    names = "corpus.sources=[{kind: embedded, name: a}, {kind: embedded, name: b}, {kind: embedded, name: c}]"
    recipe = load_recipe("quickstart", [names, "training.seq_len=128", "validation.max_tokens=512"])
    held_out = {"a": 0, "b": 2 * 128 + 1, "c": 2 * 128 + 1}
    RunData(recipe, token_set(folder.path, {"a": 1000, "b": 0, "c": 0}, held_out)).log()
    assert logged() == [
        "validation: 4 of 4 held-out windows of 128 tokens, evenly spread (a 0, b 2, c 2)",
        "WARNING: no token of b, c is trained on: empty, held out, or after max_tokens",
        "WARNING: no window of a is validated on: the loss does not include it",
    ]


def test_the_log_has_one_line_where_nothing_is_amiss(folder: RunFolder, logged: Logged) -> None:
    recipe = load_recipe("quickstart", ["training.seq_len=128", "validation.max_tokens=512"])
    RunData(recipe, token_set(folder.path, {"embedded": 1000}, {"embedded": 9 * 128 + 1})).log()
    assert logged() == ["validation: 4 of 9 held-out windows of 128 tokens, evenly spread"]


def test_the_log_warns_of_weights_that_never_come(folder: RunFolder, logged: Logged) -> None:
    sources = "corpus.sources=[{kind: embedded, name: a, weight: 1}, {kind: embedded, name: b, weight: 1}]"
    changes = "corpus.weight_changes=[{at: 1K tokens, weights: {a: 2, b: 1}}, {at: 10M tokens, weights: {a: 1, b: 0}}]"
    recipe = load_recipe("quickstart", [sources, changes, "training.seq_len=128", "training.duration=30 steps"])
    RunData(recipe, token_set(folder.path, {"a": 1000, "b": 1000}, {"a": 300, "b": 300})).log()
    assert logged() == [
        "validation: 4 of 4 held-out windows of 128 tokens, evenly spread (a 2, b 2)",
        "WARNING: weight_changes at 10M tokens are never reached: the run ends at 61,440 tokens",
    ]
