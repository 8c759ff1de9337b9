"""`inheritune-ds train`, and train.py."""

import argparse
import gc
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from inheritune_ds.cli import report
from inheritune_ds.cli.options import add_experiment, expected_machine, machine_for, planned_gpu, read_experiment
from inheritune_ds.console import log_to_console

if TYPE_CHECKING:
    from inheritune_ds.config.deepspeed import Machine, Resolved
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
    from inheritune_ds.run.folder import RunFolder, finished_before
    from inheritune_ds.training.toolchain import noexec_notes

    world = detect(os.environ)
    log_to_console(is_main=world.is_main)
    recipe, document, origin = read_experiment(args, overrides)
    document, tries = _without_micro_batch(args, document)
    # A run uses the machine that is here; --gpu only selects the GPU of the reported hours.
    gpu, chosen = planned_gpu(args.gpu) if args.dry_run else (None, [])
    machine = machine_for(gpu, world.local_size) if args.dry_run else expected_machine(world.local_size)

    def resolve(machine: "Machine") -> "Resolved":
        return resolve_for(recipe, document, origin, world_size=world.size, machine=machine)

    resolved = resolve(machine)
    folder = RunFolder(args.runs_dir / recipe.name)
    fresh = _starts_over(args, is_main=world.is_main)
    if not args.dry_run and not fresh and folder.has_finished(recipe):
        if world.is_main:  # before the budget, which needs the corpus and the reference
            print(finished_before(folder.path))
        return 0
    check_known_rows(recipe)
    tokens = count_tokens(recipe.corpus, args.cache_dir)

    def check(resolved: "Resolved", *, show: bool) -> None:
        """Check the budget, on every rank, and its text, which checks the recipe, too; print it on rank 0."""
        budget = checked_budget(recipe, resolved, tokens, world.size)
        text = budget_text(budget, notes=[*resolved.notes, *tries], gpu=args.gpu)
        if world.is_main and show:
            print(text, flush=True)

    if args.dry_run:
        budget = checked_budget(recipe, resolved, tokens, world.size)
        text = plan(
            budget, resolved.config, notes=[*chosen, *resolved.notes, *tries, *noexec_notes(os.environ)], gpu=args.gpu
        )
        if world.is_main:
            print(text, flush=True)
        refuse_what_does_not_fit(budget, machine.memory_gib)
        return 0
    check(resolved, show=machine.kind == "cpu")

    def resolve_on(found: "Machine") -> "Resolved":
        """The config for the device that torch has found, checked; printed if it is not what was expected."""
        if found == machine:
            return resolved
        other = resolve(found)
        check(other, show=True)
        return other

    settings = {"ds_document": document, "ds_origin": origin, "world": world}
    _train(args, recipe, resolve_on, settings, expected=resolved, fresh=fresh)
    return 0


def _train(  # noqa: PLR0913 - what is known before torch
    args: argparse.Namespace,
    recipe: "Recipe",
    resolve_on: Callable[["Machine"], "Resolved"],
    settings: dict[str, Any],
    *,
    expected: "Resolved",
    fresh: bool,
) -> None:
    """Start the run; torch is imported here."""
    from inheritune_ds.distributed.environment import prepare_environment
    from inheritune_ds.distributed.signals import StopSignal
    from inheritune_ds.distributed.world import export

    world = settings["world"]
    stop = StopSignal()
    stop.install()
    stop.leave_from_anywhere()
    export(world, os.environ)
    # Only torch knows whether there is a GPU, and it reads these variables as it starts.
    prepare_environment(os.environ, kind="cpu" if os.environ.get("DS_ACCELERATOR") == "cpu" else "cuda")
    gc.disable()  # the imports make no garbage, and each collection takes longer with every module
    from inheritune_ds.distributed.coordination import Coordinator
    from inheritune_ds.distributed.device import device_kind, take_device
    from inheritune_ds.distributed.process_group import end_rank, leave_now, leave_process_group
    from inheritune_ds.run.execute import execute
    from inheritune_ds.run.launch import Launch
    from inheritune_ds.training.determinism import compute_deterministically
    from inheritune_ds.training.toolchain import check_device

    gc.freeze()
    gc.enable()
    if expected.kernels.deterministic:
        compute_deterministically(os.environ)
    kind = device_kind()
    if kind == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    check_device(kind, world, offload=expected.offloads)
    try:
        meeting = Coordinator(world, stop)
        machine = take_device(kind, world, meeting)
        launch = Launch(
            **settings,
            machine=machine,
            stop=stop,
            meeting=meeting,
            runs_dir=args.runs_dir,
            cache_dir=args.cache_dir,
            auto_micro_batch=args.auto_micro_batch,
            max_minutes=args.max_minutes,
        )
        execute(recipe, resolve_on(machine), launch, fresh=fresh)
        if world.size > 1:
            end_rank()
        leave_process_group()
    except BaseException as error:
        if world.size > 1:
            leave_now(report(error))
        raise
    finally:
        stop.retire()
