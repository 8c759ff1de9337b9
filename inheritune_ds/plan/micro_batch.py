"""The `auto` micro-batch: the largest that fits according to the plan, and the config of a recipe with it."""

from dataclasses import replace
from typing import Any

from inheritune_ds.config import deepspeed_checks
from inheritune_ds.config.deepspeed import MICRO_BATCH, Machine, Resolved, batch_of, resolve
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.config.zero import read_layout
from inheritune_ds.errors import InherituneError, RecipeError
from inheritune_ds.plan.memory import largest_micro_batch
from inheritune_ds.plan.shapes import target_shape


def resolve_for(
    recipe: Recipe, document: dict[str, Any], origin: str, *, world_size: int, machine: Machine
) -> Resolved:
    """Find the shape of a recipe's target and fill in every `auto` of its DeepSpeed config.

    Args:
        recipe: The experiment.
        document: The user's JSON, from `deepspeed_checks.read`.
        origin: Name of the document in messages.
        world_size: Number of ranks.
        machine: The device of a rank.

    Raises:
        InherituneError: With every problem found.
    """
    try:
        shape = target_shape(recipe)
    except InherituneError as error:
        problems = deepspeed_checks.problems(document, origin, recipe.training.seq_len)
        if not problems:
            raise
        raise RecipeError.of([error, *problems]) from None
    resolved = resolve(document, recipe, origin=origin, shape=shape, world_size=world_size, machine=machine)
    return fit(resolved, recipe, origin=origin, world_size=world_size, machine=machine)


def fit(resolved: Resolved, recipe: Recipe, *, origin: str, world_size: int, machine: Machine) -> Resolved:
    """Add the largest micro-batch that fits to a config without one.

    Raises:
        RecipeError: The shape of the model is unknown, or not even one sequence fits.
    """
    if MICRO_BATCH in resolved.config:
        return resolved
    if resolved.shape is None:
        model = recipe.reference.model if recipe.reference else "the target"
        raise RecipeError(
            f"{origin}: {MICRO_BATCH}: auto needs the shape of the model, which is unknown for {model}",
            allowed="reference.shape in the recipe (families gpt2 and llama), or a number in the DeepSpeed config",
            action=f'write "{MICRO_BATCH}": 8, or another number of sequences that fits',
        )
    training = recipe.training
    windows, documents = training.batch_windows, training.packing == "documents"
    size = largest_micro_batch(
        *resolved.shape,
        memory_gib=machine.memory_gib,
        batch_windows=windows,
        **read_layout(resolved.config, seq_len=training.seq_len, world_size=world_size, documents=documents),
    )
    note = f"{MICRO_BATCH}: {size} (auto: the largest that {machine.memory_gib:.0f} GiB hold)"
    config = {**resolved.config, **batch_of(size, windows // world_size)}
    return replace(resolved, config=dict(sorted(config.items())), notes=(*resolved.notes, note))
