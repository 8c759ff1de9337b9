"""`inheritune-ds plan`."""

import argparse

from inheritune_ds.cli.options import add_experiment, machine_for, planned_gpu, read_experiment, refuse_below_one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_experiment(parser)
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs, i.e. ranks (default: 1)")
    parser.add_argument(
        "--mfu",
        type=float,
        help="share of the GPU's peak that one GPU reaches, such as 0.42 as measured (default: 0.5)",
    )


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """Print the plan; imports no torch."""
    from inheritune_ds.data.size import count_tokens
    from inheritune_ds.data.tokens.vocabulary import check_known_rows
    from inheritune_ds.plan.gpus import PLANNING_MFU
    from inheritune_ds.plan.micro_batch import resolve_for
    from inheritune_ds.plan.text import checked_budget, plan, refuse_what_does_not_fit

    refuse_below_one("--gpus", args.gpus)
    recipe, document, origin = read_experiment(args, overrides)
    gpu, chosen = planned_gpu(args.gpu)
    machine = machine_for(gpu, args.gpus)
    resolved = resolve_for(recipe, document, origin, world_size=args.gpus, machine=machine)
    check_known_rows(recipe)
    budget = checked_budget(recipe, resolved, count_tokens(recipe.corpus, args.cache_dir), args.gpus)
    mfu = PLANNING_MFU if args.mfu is None else args.mfu
    print(plan(budget, resolved.config, notes=[*chosen, *resolved.notes], gpu=args.gpu, mfu=mfu))
    refuse_what_does_not_fit(budget, machine.memory_gib)
    return 0
