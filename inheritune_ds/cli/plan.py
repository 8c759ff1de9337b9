"""`inheritune-ds plan`."""

import argparse

from inheritune_ds.cli.options import add_experiment, machine_for, planned_gpu, read_experiment, resolve_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_experiment(parser)
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs, i.e. ranks (default: 1)")


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """Print the plan; imports no torch."""
    from inheritune_ds.errors import RecipeError
    from inheritune_ds.plan import plan

    if args.gpus < 1:
        raise RecipeError(f"--gpus {args.gpus} is not accepted", allowed="1, 2, 3, ...", action="change --gpus")
    recipe, document, origin = read_experiment(args, overrides)
    gpu, chosen = planned_gpu(args.gpu)
    machine = machine_for(gpu, args.gpus)
    resolved = resolve_for(recipe, document, origin, world_size=args.gpus, machine=machine)
    print(
        plan(
            recipe,
            resolved.config,
            notes=[*chosen, *resolved.notes],
            world_size=args.gpus,
            gpu=args.gpu,
            cache_dir=args.cache_dir,
        )
    )
    return 0
