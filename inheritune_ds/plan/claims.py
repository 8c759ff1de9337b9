"""Check the published cost of a recipe against the floor in hours."""

from inheritune_ds.config.recipe import Recipe
from inheritune_ds.plan.budget import Budget, Tokens
from inheritune_ds.plan.gpus import PLANNING_MFU, gpu, hours

MFU_CONVENTION = "MFU counts attention in full, PaLM's convention; the floor counts no more than causal attention needs"
BEST_PUBLISHED_MFU = 0.64
"""llm.c, GPT-2 774M on A100 (its scripts/run_gpt2_774M.sh: 38.6 thousand tokens/s a GPU)."""


def amount(recipe: Recipe, unique: Tokens | None) -> str:
    """The duration as text, such as `8 epochs of 1B tokens`."""
    if recipe.training.duration.unit == "epochs" and unique:
        return f"{recipe.training.duration} of {short_count(unique.count)} tokens"
    return str(recipe.training.duration)


def short_count(count: float) -> str:
    """A count with four digits: `1.816B`, `250M`; an integer below a million."""
    if count >= 1e9:
        return f"{count / 1e9:.4g}B"
    return f"{count / 1e6:.4g}M" if count >= 1e6 else f"{count:,.0f}"


def check_claim(budget: Budget) -> str | None:
    """Check whether the published cost of a recipe is possible with the FLOPs of its run; None without a claim.

    Raises:
        RecipeError: When the claim names an unknown GPU.
    """
    claim = budget.recipe.published_claim
    if claim is None:
        return None
    card = gpu(claim.gpu)
    least, flops = budget.floor_flops(), budget.flops
    run, quoted = amount(budget.recipe, budget.unique), f'the "{claim.text}" of the paper ({claim.source})'
    if least is None or flops is None:
        return f"{quoted} cannot be checked: the model or the corpus is unknown"
    floor = hours(least, card, claim.gpus, 1.0)
    needed = hours(flops, card, claim.gpus, 1.0) / claim.hours
    cards = f"{claim.gpus} x {card.label} ({card.peak_bf16_flops / 1e12:.1f} TFLOP/s)"
    planned = hours(flops, card, claim.gpus, PLANNING_MFU)
    figures = (
        f"the floor is {floor:.1f} hours at 100 % of the peak of {cards}, {planned:.1f} hours at "
        f"{PLANNING_MFU * 100:.0f} % MFU; {claim.hours:g} hours would need an MFU of {needed * 100:.0f} % "
        f"({MFU_CONVENTION})"
    )
    if floor > claim.hours:
        return f"{run} cannot fit {quoted}: {figures}"
    if needed > BEST_PUBLISHED_MFU:
        return f"{run} can hardly fit {quoted}, the best published MFU is {BEST_PUBLISHED_MFU * 100:.0f} %: {figures}"
    return f"{run} can fit {quoted}: {figures}"
