"""The command line: a module per verb, arguments and printing only."""

import argparse
import importlib
import os
import sys
import time
import traceback
from collections.abc import Sequence

from inheritune_ds.errors import InherituneError

VERBS = {
    "train": "train a recipe: prepare, inherit, train, export, report (also: train.py)",
    "prepare": "make the token files of a recipe: read, tokenize, split, count",
    "plan": "print the resolved recipe and DeepSpeed config and the whole budget",
    "inherit": "cut a model: keep some of its blocks, verify the result, write a Hugging Face folder",
    "checkpoints": "list, verify or prune the checkpoints of a run",
    "study": "train a reference, its target and a baseline, and compare them",
    "recipes": "list the shipped recipes",
}
SIBLING_GRACE_S = 3.0
"""Other ranks print an error only if rank 0 has not ended the run with the same error within this time."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; return the exit code (docs/reference/exit_codes.md)."""
    try:
        from inheritune_ds.console import own_screen
        from inheritune_ds.storage.redaction import redact

        own_screen(redact)
        return _run(*_parse(list(sys.argv[1:] if arguments is None else arguments)))
    except KeyboardInterrupt as error:
        return report(error)


def report(error: BaseException) -> int:
    """Print the error that ends a verb; its exit code."""
    from inheritune_ds.errors import InherituneError

    if isinstance(error, InherituneError):
        _complain(f"error: {error}")
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        _complain("interrupted; finished stages are kept, rerun the same command to resume")
        return 130
    traceback.print_exception(error)
    return 1


def _parse(given: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the arguments of a verb and its overrides."""
    parser = argparse.ArgumentParser(
        prog="inheritune-ds",
        description="Turn a large pretrained causal LM into a smaller one and continue pre-training (Inheritune).",
        epilog="`inheritune-ds VERB --help` lists the options of a verb.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    wanted = next((word for word in given if not word.startswith("-")), None)
    chosen = parser
    for verb, summary in VERBS.items():
        subparser = verbs.add_parser(verb, help=summary, description=summary, allow_abbrev=False)
        if verb == wanted:
            chosen = subparser
            importlib.import_module(f"inheritune_ds.cli.{verb}").add_arguments(subparser)
            subparser.usage = f"{subparser.format_usage().removeprefix('usage: ').rstrip()} [key.path=value ...]"
    args, rest = parser.parse_known_args(given)
    stray = [word for word in rest if word.startswith("-") or "=" not in word]
    if stray:
        chosen.error(f"unrecognized arguments: {' '.join(stray)} (an override is key.path=value)")
    return args, rest


def _run(args: argparse.Namespace, overrides: list[str]) -> int:
    module = importlib.import_module(f"inheritune_ds.cli.{args.verb}")
    try:
        return int(module.run(args, overrides))
    except InherituneError as error:
        return report(error)


def _complain(message: str) -> None:
    """Print an error once, even if all ranks meet it."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    if rank != "0":
        time.sleep(SIBLING_GRACE_S)
        message = f"rank {rank}: {message}"
    print(f"inheritune-ds: {message}", file=sys.stderr, flush=True)
