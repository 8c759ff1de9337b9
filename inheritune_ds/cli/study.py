"""`inheritune-ds study`."""

import argparse
from pathlib import Path

from inheritune_ds.cli.options import add_folders, refuse_below_one
from inheritune_ds.console import log_to_console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("study", help="a shipped study (quickstart) or a YAML file")
    parser.add_argument(
        "--deepspeed_config",
        "--deepspeed-config",
        type=Path,
        default=Path("ds_configs/cpu.json"),
        metavar="JSON",
        help="DeepSpeed config of every run (default: ds_configs/cpu.json)",
    )
    parser.add_argument("--num_gpus", "--num-gpus", type=int, default=1, help="ranks of every run (default: 1)")
    add_folders(parser)
    parser.epilog = "Any other argument key.path=value overrides every recipe of the study."


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """Run the study."""
    from inheritune_ds.study.runner import run_study

    log_to_console()
    refuse_below_one("--num_gpus", args.num_gpus)
    run_study(
        args.study,
        deepspeed_config=args.deepspeed_config,
        num_ranks=args.num_gpus,
        runs_dir=args.runs_dir,
        cache_dir=args.cache_dir,
        overrides=overrides,
    )
    return 0
