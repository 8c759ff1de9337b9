import pytest

from inheritune_ds.config.loading import load_recipe
from inheritune_ds.errors import RecipeError
from inheritune_ds.plan.checks import check_lengths
from inheritune_ds.training.schedule import lr_ratio


@pytest.mark.parametrize(
    ("kind", "warm_up", "steps", "allowed"),
    [
        ("cosine", 20, 20, "0 to 18"),
        ("cosine", 21, 20, "0 to 18"),
        ("cosine", 19, 20, "0 to 18"),
        ("wsd", 20, 20, "0 to 19"),
        ("constant", 20, 20, "0 to 19"),
        ("cosine", 1, 1, "0 to 0"),
    ],
)
def test_a_warm_up_as_long_as_the_run_is_refused(kind: str, warm_up: int, steps: int, allowed: str) -> None:
    recipe = load_recipe("quickstart", [f"schedule.kind={kind}", f"schedule.warmup_steps={warm_up}"])
    assert all(lr_ratio(recipe.schedule, step, steps) < 1.0 for step in range(steps))
    with pytest.raises(RecipeError) as caught:
        check_lengths(recipe, steps)
    assert caught.value.problem == (
        f"recipe quickstart: schedule.warmup_steps {warm_up} is too long for the {steps} steps of the run "
        f"({recipe.training.duration}): no step would have the learning rate optimizer.lr"
    )
    assert caught.value.allowed == allowed
    assert "schedule.warmup_steps=" in caught.value.action
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(("kind", "warm_up", "steps"), [("cosine", 18, 20), ("wsd", 19, 20), ("constant", 19, 20)])
def test_a_warm_up_that_reaches_the_peak_is_accepted(kind: str, warm_up: int, steps: int) -> None:
    recipe = load_recipe("quickstart", [f"schedule.kind={kind}", f"schedule.warmup_steps={warm_up}"])
    check_lengths(recipe, steps)
    assert any(lr_ratio(recipe.schedule, step, steps) == 1.0 for step in range(steps))


def test_one_step_and_an_unknown_number_of_steps_are_accepted() -> None:
    check_lengths(load_recipe("quickstart", ["schedule.warmup_steps=0"]), 1)
    check_lengths(load_recipe("quickstart", ["schedule.warmup_steps=1_000_000"]), None)


def test_a_validation_of_less_than_two_windows_is_refused() -> None:
    recipe = load_recipe("quickstart", ["training.seq_len=256", "validation.max_tokens=511"])
    with pytest.raises(RecipeError) as caught:
        check_lengths(recipe, None)
    assert caught.value.problem == (
        "recipe quickstart: validation.max_tokens 511 is less than 2 windows of training.seq_len 256: "
        "there would be no standard error"
    )
    assert caught.value.allowed == "at least 512"
    assert caught.value.action == "set validation.max_tokens=512 or more, or remove it"
    check_lengths(
        recipe.model_copy(update={"validation": recipe.validation.model_copy(update={"max_tokens": 512})}), 1000
    )


def test_both_lengths_are_reported_at_once() -> None:
    recipe = load_recipe("quickstart", ["validation.max_tokens=1", "schedule.warmup_steps=99"])
    with pytest.raises(RecipeError, match="2 problems found"):
        check_lengths(recipe, 50)
