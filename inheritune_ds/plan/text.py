"""The text of `--dry-run` and `inheritune-ds plan`: the resolved pair of documents and their cost; without torch."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from inheritune_ds.config.deepspeed import Resolved
from inheritune_ds.config.loading import dump_recipe
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.plan.budget import Budget, Tokens, build_budget
from inheritune_ds.plan.checks import check_lengths
from inheritune_ds.plan.claims import check_claim, short_count
from inheritune_ds.plan.gpus import PLANNING_MFU, Gpu, check_mfu, gpu, identify
from inheritune_ds.plan.machine import detect_gpus
from inheritune_ds.plan.memory import does_not_fit
from inheritune_ds.plan.model_size import GIB
from inheritune_ds.plan.tables import (
    UNKNOWN_CORPUS,
    UNKNOWN_MODEL,
    communication_lines,
    hours_lines,
    memory_lines,
    scaling_lines,
    wrap,
)

_DEFAULT_GPUS = ("a6000", "a100-80", "h100", "h200")


def checked_budget(recipe: Recipe, resolved: Resolved, unique: Tokens | None, world_size: int) -> Budget:
    """Compute the budget of a run and check its lengths.

    Raises:
        RecipeError: For inconsistent lengths (`check_lengths`, `steps_in`).
    """
    budget = build_budget(recipe, resolved.config, shape=resolved.shape, unique=unique, world_size=world_size)
    guessed = recipe.training.duration.unit == "epochs" and unique is not None and unique.estimate
    check_lengths(recipe, None if guessed else budget.steps)
    return budget


def plan(
    budget: Budget, ds_config: Mapping[str, Any], *, notes: Sequence[str], gpu: str | None, mfu: float = PLANNING_MFU
) -> str:
    """Render the plan of a run as plain text.

    Args:
        budget: Of the run.
        ds_config: The resolved DeepSpeed config.
        notes: A line on each choice of its resolution.
        gpu: Short name of a GPU; None for hours on the common ones, and the rest for the first of them.
        mfu: Assumed share of the peak on one GPU.

    Raises:
        RecipeError: For an unknown GPU or an impossible MFU.
    """
    check_mfu(mfu)
    pair = {
        f"recipe.resolved.yaml ({budget.recipe.name})": dump_recipe(budget.recipe),
        "ds_config.resolved.json": json.dumps(dict(ds_config), indent=2),
    }
    scaling = "\n".join(scaling_lines(budget, _cards(gpu)[0], mfu))
    return _sections({**pair, **_costs(budget, notes, gpu, mfu), "scaling": scaling, **_claim(budget)})


def budget_text(budget: Budget, *, notes: Sequence[str], gpu: str | None, mfu: float = PLANNING_MFU) -> str:
    """The plan without the two documents and the scaling, for the start of a run."""
    return _sections({**_costs(budget, notes, gpu, mfu), **_claim(budget)})


def refuse_what_does_not_fit(budget: Budget, memory_gib: float) -> None:
    """Raise RecipeError, with changes that would help, if a known shape needs more than the memory of one rank."""
    job = budget.job
    if job is not None and budget.memory is not None and budget.memory.total_gib > memory_gib:
        sizes = {"micro_batch_size": budget.micro_batch_size, "accumulation": budget.accumulation}
        raise does_not_fit(job.shape, job.num_blocks, memory_gib=memory_gib, **sizes, **budget.layout)


def _cards(gpu_name: str | None) -> list[Gpu]:
    """The named GPU; or this machine's GPU, if known, and the common ones."""
    if gpu_name:
        return [gpu(gpu_name)]
    here = [known for device in detect_gpus()[:1] if (known := identify(device.name)) is not None]
    return [*here, *(card for name in _DEFAULT_GPUS if (card := gpu(name)) not in here)]


def _costs(budget: Budget, notes: Sequence[str], gpu_name: str | None, mfu: float) -> dict[str, str]:
    """The sections on the cost of the run."""
    cards = _cards(gpu_name)
    return {
        "choices made": "\n".join(wrap("- ", note) for note in notes),
        "budget": "\n".join(wrap(f"{label:<20}", value) for label, value in _budget_rows(budget)),
        "memory of one GPU": "\n".join(memory_lines(budget, cards[0])),
        "hours": "\n".join(hours_lines(budget, cards, mfu)),
        "communication of a step": "\n".join(communication_lines(budget, cards[0])),
    }


def _claim(budget: Budget) -> dict[str, str]:
    return {"published claim": wrap("", check_claim(budget) or "")}


def _sections(texts: Mapping[str, str]) -> str:
    return "\n".join(f"--- {title}\n{text.rstrip()}\n" for title, text in texts.items() if text.strip())


def _budget_rows(budget: Budget) -> Iterator[tuple[str, str]]:
    recipe, count, layout = budget.recipe, budget.parameters, budget.layout
    parameters = UNKNOWN_MODEL
    if count is not None:
        parameters = (
            f"{short_count(count.total)} total ({count.total:,}), {short_count(count.blocks)} of them in "
            f"{count.blocks // count.per_block} blocks of {short_count(count.per_block)}"
        )
    yield "parameters", parameters
    batch = f"micro-batch {budget.micro_batch_size} x accumulation {budget.accumulation}"
    on = f"ranks {layout['world_size']} x seq_len {layout['seq_len']}"
    yield "tokens per step", f"{budget.tokens_a_step:,} = {batch} x {on}"
    unique = budget.unique
    guessed = " (estimate)" if unique and unique.estimate else ""
    yield "unique tokens", f"{unique.count:,}{guessed}" if unique else UNKNOWN_CORPUS
    by_epochs = guessed if recipe.training.duration.unit == "epochs" else ""
    yield "steps", UNKNOWN_CORPUS if budget.steps is None else f"{budget.steps:,}{by_epochs}"
    yield "tokens seen", UNKNOWN_CORPUS if budget.tokens_seen is None else f"{budget.tokens_seen:,}{by_epochs}"
    yield "epochs", UNKNOWN_CORPUS if budget.epochs is None else f"{budget.epochs:.2f}{guessed}"
    if budget.flops_a_token is None:
        yield "FLOPs", UNKNOWN_MODEL
    else:
        total = UNKNOWN_CORPUS if budget.flops is None else f"{budget.flops:.3g} in total{by_epochs}"
        yield "FLOPs", f"{budget.flops_a_token / 1e9:.4g} GFLOP per token, {total}"
    if budget.checkpoint_bytes is None:
        yield "checkpoint", UNKNOWN_MODEL
    else:
        size = budget.checkpoint_bytes
        yield "checkpoint", f"{_gib(size / GIB)} ({size:,} bytes), every {recipe.checkpoint.interval_steps} steps"
    yield from _sizes("download", budget.download_gib, "nothing")
    if recipe.reference and recipe.reference.recipe_name:
        yield "", f"{recipe.reference.model} is trained first if missing; its own plan shows the cost"
    yield from _sizes("disk", {name: size for name, size in budget.disk_gib.items() if size}, UNKNOWN_MODEL)


def _sizes(label: str, sizes: Mapping[str, float | None], nothing: str) -> Iterator[tuple[str, str]]:
    """Rows of a sum and its parts."""
    known = [size for size in sizes.values() if size is not None]
    if not sizes:
        yield label, nothing
        return
    rest = "" if len(known) == len(sizes) else " and an unknown size" if known else "size unknown"
    yield label, (_gib(sum(known)) if known else "") + rest
    for name, size in sizes.items():
        yield "", f"  {name}: {'size unknown' if size is None else _gib(size)}"


def _gib(size: float) -> str:
    return f"{size:,.1f} GiB" if size >= 0.1 else f"{size * 1024:,.1f} MiB"
