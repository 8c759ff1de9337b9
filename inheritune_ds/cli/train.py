"""`inheritune-ds train`, and train.py."""

import argparse
import gc
import math
import os
from typing import TYPE_CHECKING, Any

from inheritune_ds.cli.options import add_experiment, machine_for, planned_gpu, read_experiment
from inheritune_ds.console import log_to_console

if TYPE_CHECKING:
    from inheritune_ds.config.deepspeed import Resolved
    from inheritune_ds.config.recipe import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_experiment(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configs and the budget, train nothing"
    )
    parser.add_argument(
        "--auto-micro-batch",
        action="store_true",
        help="find the largest micro-batch that fits by real steps; the global batch does not change",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="start over: rename the existing run folder, delete nothing",
    )
    parser.add_argument(
        "--max-minutes",
        type=_minutes,
        metavar="M",
        help="stop early enough that a last save fits into this time; rerun the same command to resume",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by launchers; LOCAL_RANK decides")


def _minutes(text: str) -> float:
    """Parse a time limit above 0."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0.0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time limit (allowed: minutes, a number above 0)")
    return minutes


def _starts_over(args: argparse.Namespace, *, is_main: bool) -> bool:
    """Whether to start over; restarts by schedulers and launchers ignore --fresh."""
    for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        count = os.environ.get(name, "")
        if args.fresh and count.isdecimal() and int(count) > 0:
            if is_main:
                print(f"--fresh is ignored: this is restart {count} ({name}), which resumes the run")
            return False
    return bool(args.fresh)


def _without_micro_batch(args: argparse.Namespace, document: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Put 1 for the micro-batch that --auto-micro-batch will find; return the DeepSpeed JSON and a note."""
    from inheritune_ds.config.deepspeed import MICRO_BATCH

    if not args.auto_micro_batch:
        return document, []
    given = document.get(MICRO_BATCH)
    aside = f"; the config's {given} is ignored" if type(given) is int else ""
    note = f"{MICRO_BATCH}: found by real steps when training starts (--auto-micro-batch){aside}; this plan uses 1"
    if given in (None, "auto") or type(given) is int:
        document = {**document, MICRO_BATCH: 1}
    return document, [note]


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """Check everything, print the budget, then train."""
    from inheritune_ds.data.size import count_tokens
    from inheritune_ds.data.tokens.vocabulary import check_known_rows
    from inheritune_ds.distributed.world import detect
    from inheritune_ds.plan.micro_batch import resolve_for
    from inheritune_ds.plan.text import budget_text, checked_budget, plan, refuse_what_does_not_fit
    from inheritune_ds.run.folder import RunFolder
    from inheritune_ds.training.toolchain import noexec_notes

    world = detect(os.environ)
    log_to_console(is_main=world.is_main)
    recipe, document, origin = read_experiment(args, overrides)
    document, tries = _without_micro_batch(args, document)
    # A run uses the machine that is here; --gpu only selects the GPU of the reported hours.
    gpu, chosen = planned_gpu(args.gpu) if args.dry_run else (None, [])
    machine = machine_for(gpu, world.local_size)
    resolved = resolve_for(recipe, document, origin, world_size=world.size, machine=machine)
    folder = RunFolder(args.runs_dir / recipe.name)
    fresh = _starts_over(args, is_main=world.is_main)
    if not args.dry_run and not fresh and folder.has_finished(recipe):
        if world.is_main:  # before the budget, which needs the corpus and the reference
            print(folder.finished_before)
        return 0
    check_known_rows(recipe)
    # On every rank, since the budget and its text also check the recipe.
    budget = checked_budget(recipe, resolved, count_tokens(recipe.corpus, args.cache_dir), world.size)
    notes = [*chosen, *resolved.notes, *tries]
    if args.dry_run:
        text = plan(budget, resolved.config, notes=[*notes, *noexec_notes(os.environ)], gpu=args.gpu)
    else:
        text = budget_text(budget, notes=notes, gpu=args.gpu)
    if world.is_main:
        print(text, flush=True)
    if args.dry_run:
        refuse_what_does_not_fit(budget, machine.memory_gib)
    else:
        settings = {"ds_document": document, "ds_origin": origin, "machine": machine, "world": world}
        _train(args, recipe, resolved, settings, fresh=fresh)
    return 0


def _train(
    args: argparse.Namespace, recipe: "Recipe", resolved: "Resolved", settings: dict[str, Any], *, fresh: bool
) -> None:
    """Start the run; torch is imported here."""
    from inheritune_ds.distributed.environment import prepare_environment
    from inheritune_ds.distributed.signals import StopSignal
    from inheritune_ds.distributed.world import export

    machine, world = settings["machine"], settings["world"]
    stop = StopSignal()
    stop.install()
    stop.leave_from_anywhere()
    export(world, os.environ)
    prepare_environment(os.environ, kind=machine.kind)
    gc.disable()  # the imports make no garbage, and each collection takes longer with every module
    from inheritune_ds.distributed.process_group import leave_process_group
    from inheritune_ds.run.execute import execute
    from inheritune_ds.run.launch import Launch
    from inheritune_ds.training.toolchain import check_device

    gc.freeze()
    gc.enable()
    check_device(machine.kind, world, offload=resolved.offloads)
    launch = Launch(
        **settings,
        stop=stop,
        runs_dir=args.runs_dir,
        cache_dir=args.cache_dir,
        auto_micro_batch=args.auto_micro_batch,
        max_minutes=args.max_minutes,
    )
    try:
        execute(recipe, resolved, launch, fresh=fresh)
    finally:
        leave_process_group()
        stop.retire()
