"""Checks of a recipe's lengths before the preparation."""

from inheritune_ds.config.recipe import Recipe
from inheritune_ds.errors import InherituneError, RecipeError

MIN_VALIDATION_WINDOWS = 2
"""One window has no spread."""


def check_lengths(recipe: Recipe, total_steps: int | None) -> None:
    """Refuse a warm-up as long as the run, and a validation of less than two windows.

    Args:
        recipe: The experiment.
        total_steps: Optimizer steps of its run; None if unknown before tokenization.

    Raises:
        RecipeError: With every problem found.
    """
    problems: list[InherituneError] = []
    warm_up, window = recipe.schedule.warmup_steps, recipe.training.seq_len
    # A cosine's last step is at its end; the peak has to be before it (except in a run of one step).
    end = 2 if recipe.schedule.kind == "cosine" and total_steps != 1 else 1
    if total_steps is not None and warm_up > total_steps - end:
        problems.append(
            RecipeError(
                f"recipe {recipe.name}: schedule.warmup_steps {warm_up} is too long for the {total_steps} steps of the "
                f"run ({recipe.training.duration}): no step would have the learning rate optimizer.lr",
                allowed=f"0 to {total_steps - end}",
                action=f"set schedule.warmup_steps={total_steps // 10}, or make training.duration longer",
            )
        )
    if recipe.validation.max_tokens < MIN_VALIDATION_WINDOWS * window:
        problems.append(
            RecipeError(
                f"recipe {recipe.name}: validation.max_tokens {recipe.validation.max_tokens} is less than "
                f"{MIN_VALIDATION_WINDOWS} windows of training.seq_len {window}: there would be no standard error",
                allowed=f"at least {MIN_VALIDATION_WINDOWS * window}",
                action=f"set validation.max_tokens={MIN_VALIDATION_WINDOWS * window} or more, or remove it",
            )
        )
    if problems:
        raise RecipeError.of(problems)
