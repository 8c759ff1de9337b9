from types import SimpleNamespace
from typing import Any

import pytest

from inheritune_ds.errors import RecipeError
from inheritune_ds.recipe_file import load_recipe
from inheritune_ds.run import _Run


def steps(*overrides: str, train_tokens: int) -> int:
    run = _Run.__new__(_Run)
    run._recipe = load_recipe("quickstart", ["training.seq_len=128", "training.global_batch_tokens=2048", *overrides])
    prepared: Any = SimpleNamespace(tokens=SimpleNamespace(train_tokens=train_tokens))
    return run._total_steps(prepared)


def test_a_warm_up_that_only_the_tokens_show_to_be_too_long_ends_the_run_before_its_first_step() -> None:
    assert steps("training.duration=1 epochs", train_tokens=22 * 2048 + 1) == 22
    with pytest.raises(RecipeError, match=r"schedule\.warmup_steps 20 is too long for the 21 steps of the run"):
        steps("training.duration=1 epochs", train_tokens=21 * 2048 + 1)
