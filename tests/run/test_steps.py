"""The number of steps, from the windows of the token files."""

from pathlib import Path

import pytest

from inheritune_ds.config.loading import load_recipe
from inheritune_ds.data.tokens.token_set import TokenSet
from inheritune_ds.errors import CorpusError, RecipeError
from inheritune_ds.run.data import RunData
from inheritune_ds.training.packing import DocumentPacking
from tests.run.tokens import token_set


def total_steps(folder: Path, *train_tokens: int) -> int:
    """Of one epoch in windows of 128 tokens, 16 a step."""
    train = {f"source-{number}": tokens for number, tokens in enumerate(train_tokens)}
    sources = [f"{{kind: embedded, name: {name}}}" for name in train]
    given = ["training.seq_len=128", "training.global_batch_tokens=2048", "training.duration=1 epochs"]
    recipe = load_recipe("quickstart", [f"corpus.sources=[{', '.join(sources)}]", *given])
    return RunData(recipe, token_set(folder, train, {})).total_steps


def test_warmup_longer_than_the_run_is_refused(tmp_path: Path) -> None:
    assert total_steps(tmp_path, 22 * 2048 + 1) == 22
    with pytest.raises(RecipeError, match=r"schedule\.warmup_steps 20 is too long for the 21 steps of the run"):
        total_steps(tmp_path, 21 * 2048 + 1)


def test_epoch_has_the_windows_of_every_source(tmp_path: Path) -> None:
    """The remaining 100 tokens of each source do not form a window together."""
    assert total_steps(tmp_path, 11 * 2048 + 100, 11 * 2048 + 100) == 22


@pytest.mark.parametrize(
    ("form", "refused"), [("<s> text </s>", False), ("text </s>", False), ("</s> text </s>", True)]
)
def test_packing_needs_an_end_token_at_the_end_only(tmp_path: Path, form: str, *, refused: bool) -> None:
    recipe = load_recipe("quickstart", ["training.packing=documents"])
    data = RunData(recipe, TokenSet(tmp_path, {"document_form": form, "eos_id": 2}))
    if not refused:
        assert data.packing == DocumentPacking(2)
        return
    with pytest.raises(
        RecipeError, match=r"(?s)writes a document as '</s> text </s>'.*another token than </s>.*packing: windows"
    ):
        _ = data.packing


def test_empty_source_is_skipped_without_weights(tmp_path: Path) -> None:
    assert total_steps(tmp_path, 22 * 2048 + 1, 0) == 22
    with pytest.raises(CorpusError, match="'source-1' has 100 tokens, fewer than one window"):
        total_steps(tmp_path, 22 * 2048 + 1, 100)
