"""What `--dry-run` and `inheritune-ds plan` print: the resolved pair of documents, then what it costs.

Torch is not imported here: a login node can show the plan at once.
"""

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from inheritune_ds.budget import GIB
from inheritune_ds.corpus_size import count_tokens
from inheritune_ds.cost import Budget, build_budget, check_claim, short_count
from inheritune_ds.gpus import PLANNING_MFU, gpu, hours
from inheritune_ds.recipe import Recipe
from inheritune_ds.recipe_file import dump_recipe
from inheritune_ds.shapes import target_shape
from inheritune_ds.training.lengths import check_lengths

WIDTH = 110
_LABEL = 20
_DEFAULT_GPUS = ("a6000", "a100-80", "h100", "h200")
_UNKNOWN_MODEL = "unknown until the reference is read"
_UNKNOWN_CORPUS = "unknown until the corpus is tokenized"


def plan(  # noqa: PLR0913 - all but the first two are named at every call
    recipe: Recipe,
    ds_config: Mapping[str, Any],
    *,
    notes: Sequence[str],
    world_size: int,
    gpu: str | None,
    cache_dir: Path,
) -> str:
    """Render the plan of a run as plain text.

    Args:
        recipe: The recipe with its overrides.
        ds_config: The resolved DeepSpeed config.
        notes: A line on each choice made while it was resolved.
        world_size: Ranks.
        gpu: Short name of the GPU to compute hours for; the common ones when None.
        cache_dir: Where token files of earlier runs are.

    Raises:
        RecipeError: For an unknown GPU, or lengths that do not go together (`check_lengths`, `steps_in`).
        SurgeryError: When more blocks are selected than the reference has.
        CorpusError: When a corpus file is missing, or the tokenizer does not fit the model.
    """
    pair = {
        f"recipe.resolved.yaml ({recipe.name})": dump_recipe(recipe),
        "ds_config.resolved.json": json.dumps(dict(ds_config), indent=2),
    }
    told = budget_text(recipe, ds_config, notes=notes, world_size=world_size, gpu=gpu, cache_dir=cache_dir)
    return f"{_sections(pair)}\n{told}"


def budget_text(  # noqa: PLR0913 - as for `plan`
    recipe: Recipe,
    ds_config: Mapping[str, Any],
    *,
    notes: Sequence[str],
    world_size: int,
    gpu: str | None,
    cache_dir: Path,
) -> str:
    """Render the part of `plan` that a run prints before it starts: choices, budget, memory, hours, claim."""
    unique = count_tokens(recipe.corpus, cache_dir)
    budget = build_budget(recipe, ds_config, shape=target_shape(recipe), unique=unique, world_size=world_size)
    guessed = recipe.training.duration_parts[1] == "epochs" and unique is not None and unique.estimate
    check_lengths(recipe, None if guessed else budget.steps)
    return _sections(
        {
            "choices made": "\n".join(_wrap("- ", note) for note in notes),
            "budget": "\n".join(_row(*row) for row in _budget_rows(recipe, budget)),
            "memory of one GPU": "\n".join(_memory_lines(budget)),
            "hours": "\n".join(_hours_lines(budget, [gpu] if gpu else list(_DEFAULT_GPUS))),
            "published claim": _wrap("", check_claim(recipe, budget.flops, unique) or ""),
        }
    )


def _sections(texts: Mapping[str, str]) -> str:
    return "\n".join(f"--- {title}\n{text.rstrip()}\n" for title, text in texts.items() if text.strip())


def _wrap(first: str, text: str, indent: int | None = None) -> str:
    rest = " " * (len(first) if indent is None else indent)
    return textwrap.fill(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def _row(label: str, value: str) -> str:
    return _wrap(f"{label:<{_LABEL}}", value)


def _budget_rows(recipe: Recipe, budget: Budget) -> Iterator[tuple[str, str]]:
    count, layout = budget.parameters, budget.layout
    if count is None:
        yield "parameters", _UNKNOWN_MODEL
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
    yield "unique tokens", f"{unique.count:,}{guessed}" if unique else _UNKNOWN_CORPUS
    by_epochs = guessed if recipe.training.duration_parts[1] == "epochs" else ""
    yield "steps", _UNKNOWN_CORPUS if budget.steps is None else f"{budget.steps:,}{by_epochs}"
    yield "tokens seen", _UNKNOWN_CORPUS if budget.tokens_seen is None else f"{budget.tokens_seen:,}{by_epochs}"
    yield "epochs", _UNKNOWN_CORPUS if budget.epochs is None else f"{budget.epochs:.2f}{guessed}"
    if budget.flops_a_token is None:
        yield "FLOPs", _UNKNOWN_MODEL
    else:
        total = _UNKNOWN_CORPUS if budget.flops is None else f"{budget.flops:.3g} in all{by_epochs}"
        yield "FLOPs", f"{budget.flops_a_token / 1e9:.4g} GFLOP a token, {total}"
    if budget.checkpoint_bytes is None:
        yield "checkpoint", _UNKNOWN_MODEL
    else:
        size = budget.checkpoint_bytes
        yield "checkpoint", f"{_gib(size / GIB)} ({size:,} bytes), every {recipe.checkpoint.interval_steps} steps"
    yield from _sizes("download", budget.download_gib, "nothing")
    if recipe.reference and recipe.reference.recipe_name:
        yield "", f"{recipe.reference.model} is trained first when it is missing: its own plan tells what it costs"
    yield from _sizes("disk", {name: size for name, size in budget.disk_gib.items() if size}, _UNKNOWN_MODEL)


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


def _memory_lines(budget: Budget) -> Iterator[str]:
    if budget.memory is None:
        yield _UNKNOWN_MODEL
        return
    moments, layout = (budget.memory.backward, budget.memory.update), budget.layout
    yield f"{'GiB':<28}{'backward pass':>14}{'update':>10}"
    for part in dict.fromkeys([*moments[0], *moments[1]]):
        sizes = [f"{moment[part]:.2f}" if part in moment else "-" for moment in moments]
        yield f"{part:<28}{sizes[0]:>14}{sizes[1]:>10}"
    totals = [sum(moment.values()) for moment in moments]
    kernels = f"{layout.get('activation_checkpointing', 'none')} recomputed, {layout.get('loss', 'chunked')} loss"
    yield (
        f"{'total':<28}{totals[0]:>14.2f}{totals[1]:>10.2f}   ZeRO-{layout['zero_stage']}, {layout['precision']}, "
        f"ranks: {layout['world_size']}; {kernels}"
    )
    if budget.memory.host_gib:
        yield f"{'on the host, a rank':<28}{budget.memory.host_gib:>14.2f}"


def _hours_lines(budget: Budget, names: Sequence[str]) -> Iterator[str]:
    cards, ranks = [gpu(name) for name in names], budget.layout["world_size"]
    if budget.flops is None:
        yield _UNKNOWN_MODEL if budget.flops_a_token is None else _UNKNOWN_CORPUS
        return
    yield f"{'GPU':<24}{'at 50 % MFU':>14}{'floor (100 %)':>16}   memory"
    for card in cards:
        planned, floor = hours(budget.flops, card, ranks, PLANNING_MFU), hours(budget.flops, card, ranks, 1.0)
        need = budget.memory.total_gib if budget.memory else 0.0
        verdict = "fits" if need <= card.memory_gib else "does not fit"
        fit = f"{need:.1f} of {card.memory_gib:.0f} GiB: {verdict}"
        yield f"{f'{ranks} x {card.label}':<24}{_hours(planned):>14}{_hours(floor):>16}   {fit}"
    if budget.layout["precision"] == "fp32":
        yield "The rates are bf16 peaks; this config computes in fp32, which takes longer. No rate is known for a CPU."


def _hours(value: float) -> str:
    return f"{value:,.1f}" if value >= 0.1 else "under 0.1"
