from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from inheritune_ds.config.loading import load_recipe
from inheritune_ds.data.tokens.token_set import TokenSet
from inheritune_ds.run.data import RunData
from inheritune_ds.run.folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "checkpoints").mkdir()
    return RunFolder(tmp_path)


def token_set(folder: Path, **held_out: int) -> TokenSet:
    """Sources by name with so many held-out tokens; the first has tokens to train on, the others none."""
    entries = []
    for number, (name, tokens) in enumerate(held_out.items()):
        (folder / name).mkdir()
        np.zeros(tokens, "<u2").tofile(folder / name / "validation-00000.bin")
        validation = [{"file": "validation-00000.bin", "tokens": tokens}] if tokens else []
        train = [] if number else [{"file": "train-00000.bin", "tokens": 1000}]
        entries.append({"name": name, "train": train, "validation": validation})
    return TokenSet(folder, {"token_dtype": "uint16", "sources": entries})


def test_the_log_says_how_much_is_validated_on_and_of_what(folder: RunFolder, logged: Callable[[], list[str]]) -> None:
    names = "corpus.sources=[{kind: embedded, name: a}, {kind: embedded, name: b}, {kind: embedded, name: c}]"
    recipe = load_recipe("quickstart", [names, "training.seq_len=128", "validation.max_tokens=512"])
    RunData(recipe, token_set(folder.path, a=0, b=2 * 128 + 1, c=2 * 128 + 1)).log()
    assert logged() == [
        "validation: 4 windows of 128 tokens (a 0, b 2, c 2)",
        "WARNING: no token of b, c is trained on: empty, held out, or after max_tokens",
        "WARNING: no window of a is validated on: the loss does not include it",
    ]


def test_the_log_has_one_line_where_nothing_is_amiss(folder: RunFolder, logged: Callable[[], list[str]]) -> None:
    recipe = load_recipe("quickstart", ["training.seq_len=128", "validation.max_tokens=512"])
    RunData(recipe, token_set(folder.path, embedded=3 * 128 + 1)).log()
    assert logged() == ["validation: 3 windows of 128 tokens"]


def test_the_log_warns_of_weights_that_never_come(folder: RunFolder, logged: Callable[[], list[str]]) -> None:
    sources = "corpus.sources=[{kind: embedded, name: a, weight: 1}, {kind: embedded, name: b, weight: 1}]"
    changes = "corpus.weight_changes=[{at: 1K tokens, weights: {a: 2, b: 1}}, {at: 10M tokens, weights: {a: 1, b: 0}}]"
    recipe = load_recipe("quickstart", [sources, changes, "training.seq_len=128", "training.duration=30 steps"])
    tokens = token_set(folder.path, a=300, b=300)
    for entry in tokens.manifest["sources"]:
        np.zeros(1000, "<u2").tofile(folder.path / entry["name"] / "train-00000.bin")
        entry["train"] = [{"file": "train-00000.bin", "tokens": 1000}]
    RunData(recipe, tokens).log()
    assert logged() == [
        "validation: 4 windows of 128 tokens (a 2, b 2)",
        "WARNING: weight_changes at 10M tokens are never reached: the run ends at 61,440 tokens",
    ]
