"""`inheritune-ds recipes`."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb has no arguments."""
    parser.epilog = "Give a name to train.py with --recipe, or copy the file and change it."


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """Print one line per shipped recipe."""
    from inheritune_ds.config.loading import DEFAULT_RECIPE, load_recipe, shipped_names

    del args
    names = shipped_names()
    width = max(map(len, names))
    for name in names:
        recipe = load_recipe(name, overrides)
        print(f"{name:<{width}}  {recipe.description}{' (default)' if name == DEFAULT_RECIPE else ''}")
    return 0
