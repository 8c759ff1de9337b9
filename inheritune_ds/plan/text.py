"""What `--dry-run` and `inheritune-ds plan` print: the resolved pair of documents, then what it costs.

Torch is not imported here: a login node can show the plan at once.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from inheritune_ds.config.loading import dump_recipe
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.data.size import Tokens, count_tokens
from inheritune_ds.plan.budget import Budget, build_budget
from inheritune_ds.plan.checks import check_lengths
from inheritune_ds.plan.claims import check_claim, short_count
from inheritune_ds.plan.gpus import PLANNING_MFU, Gpu, check_mfu, gpu, identify
from inheritune_ds.plan.machine import detect_gpus
from inheritune_ds.plan.memory import does_not_fit
from inheritune_ds.plan.model_size import GIB
from inheritune_ds.plan.shapes import target_shape
from inheritune_ds.plan.tables import (
    UNKNOWN_CORPUS,
    UNKNOWN_MODEL,
    communication_lines,
    hours_lines,
    memory_lines,
    scaling_lines,
    wrap,
)

_LABEL = 20
_DEFAULT_GPUS = ("a6000", "a100-80", "h100", "h200")


def plan(  # noqa: PLR0913 - all but the first two are named at every call
    recipe: Recipe,
    ds_config: Mapping[str, Any],
    *,
    notes: Sequence[str],
    world_size: int,
    gpu: str | None,
    cache_dir: Path,
    mfu: float = PLANNING_MFU,
) -> str:
    """Render the plan of a run as plain text.

    Args:
        recipe: The recipe with its overrides.
        ds_config: The resolved DeepSpeed config.
        notes: A line on each choice made while it was resolved.
        world_size: Ranks.
        gpu: Short name of the GPU to compute for; when None, hours for the common ones, the rest for the first of them.
        cache_dir: Where token files of earlier runs are.
        mfu: Share of the peak that one GPU is taken to reach.

    Raises:
        RecipeError: For an unknown GPU, an impossible MFU, or lengths that do not go together (`check_lengths`,
            `steps_in`).
        SurgeryError: When more blocks are selected than the reference has.
        CorpusError: When a corpus file is missing, or the tokenizer does not fit the model.
    """
    check_mfu(mfu)
    pair = {
        f"recipe.resolved.yaml ({recipe.name})": dump_recipe(recipe),
        "ds_config.resolved.json": json.dumps(dict(ds_config), indent=2),
    }
    budget, unique = _budget(recipe, ds_config, world_size, cache_dir)
    told = _told(recipe, budget, notes, _cards(gpu), mfu)
    return _sections(
        {
            **pair,
            **told,
            "scaling": "\n".join(scaling_lines(budget, _cards(gpu)[0], mfu)),
            "published claim": _wrapped_claim(recipe, budget, unique),
        }
    )


def budget_text(  # noqa: PLR0913 - as for `plan`
    recipe: Recipe,
    ds_config: Mapping[str, Any],
    *,
    notes: Sequence[str],
    world_size: int,
    gpu: str | None,
    cache_dir: Path,
    mfu: float = PLANNING_MFU,
) -> str:
    """Render the part of `plan` that a run prints before it starts: all but the two documents and the scaling."""
    budget, unique = _budget(recipe, ds_config, world_size, cache_dir)
    told = _told(recipe, budget, notes, _cards(gpu), mfu)
    return _sections({**told, "published claim": _wrapped_claim(recipe, budget, unique)})


def refuse_what_does_not_fit(
    recipe: Recipe, ds_config: Mapping[str, Any], *, world_size: int, memory_gib: float
) -> None:
    """Check the memory of one GPU; a shape that is not known is let through.

    Args:
        recipe: The recipe with its overrides.
        ds_config: The resolved DeepSpeed config.
        world_size: Ranks.
        memory_gib: Memory that one rank may use.

    Raises:
        RecipeError: When it does not fit, with what would.
    """
    shape = target_shape(recipe)
    budget = build_budget(recipe, ds_config, shape=shape, unique=None, world_size=world_size)
    if shape is None or budget.memory is None or budget.memory.total_gib <= memory_gib:
        return
    raise does_not_fit(
        *shape,
        memory_gib=memory_gib,
        micro_batch_size=budget.micro_batch_size,
        accumulation=budget.accumulation,
        **budget.layout,
    )


def _cards(gpu_name: str | None) -> list[Gpu]:
    """The named GPU; or the one that is here, where it is known, before the common ones."""
    if gpu_name:
        return [gpu(gpu_name)]
    here = [known for device in detect_gpus()[:1] if (known := identify(device.name)) is not None]
    return [*here, *(card for name in _DEFAULT_GPUS if (card := gpu(name)) not in here)]


def _budget(
    recipe: Recipe, ds_config: Mapping[str, Any], world_size: int, cache_dir: Path
) -> tuple[Budget, Tokens | None]:
    unique = count_tokens(recipe.corpus, cache_dir)
    budget = build_budget(recipe, ds_config, shape=target_shape(recipe), unique=unique, world_size=world_size)
    guessed = recipe.training.duration_parts[1] == "epochs" and unique is not None and unique.estimate
    check_lengths(recipe, None if guessed else budget.steps)
    return budget, unique


def _told(recipe: Recipe, budget: Budget, notes: Sequence[str], cards: Sequence[Gpu], mfu: float) -> dict[str, str]:
    return {
        "choices made": "\n".join(wrap("- ", note) for note in notes),
        "budget": "\n".join(_row(*row) for row in _budget_rows(recipe, budget)),
        "memory of one GPU": "\n".join(memory_lines(budget, cards[0])),
        "hours": "\n".join(hours_lines(budget, cards, mfu)),
        "communication of a step": "\n".join(communication_lines(budget, cards[0])),
    }


def _wrapped_claim(recipe: Recipe, budget: Budget, unique: Tokens | None) -> str:
    return wrap("", check_claim(recipe, budget.flops, unique) or "")


def _sections(texts: Mapping[str, str]) -> str:
    return "\n".join(f"--- {title}\n{text.rstrip()}\n" for title, text in texts.items() if text.strip())


def _row(label: str, value: str) -> str:
    return wrap(f"{label:<{_LABEL}}", value)


def _budget_rows(recipe: Recipe, budget: Budget) -> Iterator[tuple[str, str]]:
    count, layout = budget.parameters, budget.layout
    if count is None:
        yield "parameters", UNKNOWN_MODEL
    else:
        yield (
            "parameters",
            (
                f"{short_count(count.total)} total ({count.total:,}), {short_count(count.blocks)} of them in "
                f"{budget.num_blocks} blocks of {short_count(count.per_block)}"
            ),
        )
    yield (
        "tokens per step",
        (
            f"{budget.tokens_a_step:,} = micro-batch {budget.micro_batch_size} x accumulation {budget.accumulation} x "
            f"ranks {layout['world_size']} x seq_len {layout['seq_len']}"
        ),
    )
    unique = budget.unique
    guessed = " (estimate)" if unique and unique.estimate else ""
    yield "unique tokens", f"{unique.count:,}{guessed}" if unique else UNKNOWN_CORPUS
    by_epochs = guessed if recipe.training.duration_parts[1] == "epochs" else ""
    yield "steps", UNKNOWN_CORPUS if budget.steps is None else f"{budget.steps:,}{by_epochs}"
    yield "tokens seen", UNKNOWN_CORPUS if budget.tokens_seen is None else f"{budget.tokens_seen:,}{by_epochs}"
    yield "epochs", UNKNOWN_CORPUS if budget.epochs is None else f"{budget.epochs:.2f}{guessed}"
    if budget.flops_a_token is None:
        yield "FLOPs", UNKNOWN_MODEL
    else:
        total = UNKNOWN_CORPUS if budget.flops is None else f"{budget.flops:.3g} in all{by_epochs}"
        yield "FLOPs", f"{budget.flops_a_token / 1e9:.4g} GFLOP a token, {total}"
    if budget.checkpoint_bytes is None:
        yield "checkpoint", UNKNOWN_MODEL
    else:
        size = budget.checkpoint_bytes
        yield "checkpoint", f"{_gib(size / GIB)} ({size:,} bytes), every {recipe.checkpoint.interval_steps} steps"
    yield from _sizes("download", budget.download_gib, "nothing")
    if recipe.reference and recipe.reference.recipe_name:
        yield "", f"{recipe.reference.model} is trained first when it is missing: its own plan tells what it costs"
    yield from _sizes("disk", {name: size for name, size in budget.disk_gib.items() if size}, UNKNOWN_MODEL)


def _sizes(label: str, sizes: Mapping[str, float | None], nothing: str) -> Iterator[tuple[str, str]]:
    """Rows of a sum and its parts."""
    known = [size for size in sizes.values() if size is not None]
    if not sizes:
        yield label, nothing
        return
    rest = "" if len(known) == len(sizes) else "size unknown" if not known else " and what has no known size"
    yield label, (_gib(sum(known)) if known else "") + rest
    for name, size in sizes.items():
        yield "", f"  {name}: {'size unknown' if size is None else _gib(size)}"


def _gib(size: float) -> str:
    return f"{size:,.1f} GiB" if size >= 0.1 else f"{size * 1024:,.1f} MiB"
