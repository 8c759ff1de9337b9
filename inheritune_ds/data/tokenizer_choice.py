"""Which tokenizer a recipe's documents go through."""

from pathlib import Path

from inheritune_ds.corpus import TrainedTokenizer
from inheritune_ds.errors import RecipeError
from inheritune_ds.recipe import Recipe
from inheritune_ds.recipe_file import load_recipe


def tokenizer_of(recipe: Recipe, reference: Path | None) -> tuple[str | TrainedTokenizer, str]:
    """Name and revision of the tokenizer: the corpus's own, else the reference's.

    Args:
        recipe: The experiment.
        reference: Folder of its reference, where that is at hand.

    Raises:
        RecipeError: It is the one that the reference's own recipe trains, and the reference is not at hand.
    """
    if recipe.corpus.tokenizer is not None:
        return recipe.corpus.tokenizer, "main"
    if reference is not None:
        return str(reference), "main"
    assert recipe.reference is not None  # the recipe's own check
    inner = recipe.reference.recipe_name
    if inner is None:
        return recipe.reference.model, recipe.reference.revision
    name, revision = tokenizer_of(load_recipe(inner), None)
    if isinstance(name, TrainedTokenizer):
        raise RecipeError(
            f"recipe {recipe.name} takes the tokenizer of its reference {inner}, whose recipe trains one on its own "
            "corpus, and that has not been done yet",
            action=f"train {inner} first (train.py --recipe {inner}), or say corpus.tokenizer",
        )
    return name, revision
