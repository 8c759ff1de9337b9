"""`inheritune-ds prepare`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from inheritune_ds.cli.options import add_folders, refuse_below_one
from inheritune_ds.console import log_to_console

if TYPE_CHECKING:
    from inheritune_ds.config.recipe import Recipe
    from inheritune_ds.data.tokens.token_set import TokenSet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--recipe", help="a shipped name or a YAML file (default: openllama-3b-13l)")
    parser.add_argument("--workers", type=int, help="processes that tokenize (default: one for each core)")
    parser.add_argument("--verify", action="store_true", help="compare the hash of every existing token file")
    add_folders(parser)
    parser.epilog = "Any other argument key.path=value overrides the recipe, e.g. corpus.preset=slimpajama."


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """Make the token files of a recipe and print their counts."""
    from inheritune_ds.config.loading import DEFAULT_RECIPE, load_recipe

    refuse_below_one("--workers", args.workers)
    recipe = load_recipe(DEFAULT_RECIPE if args.recipe is None else args.recipe, overrides)
    from inheritune_ds.data.tokens.prepare import prepare
    from inheritune_ds.data.tokens.token_set import find_damage
    from inheritune_ds.data.tokens.tokenizer import tokenizer_of

    log_to_console()
    tokenizer, revision = tokenizer_of(recipe, _trained_reference(recipe, args.runs_dir))
    tokens = prepare(
        recipe.corpus,
        tokenizer,
        args.cache_dir,
        revision=revision,
        workers=args.workers,
        damage_of=find_damage if args.verify else lambda _: None,
    )
    print(_table(tokens), flush=True)
    if args.verify:
        print("every file has the sha256 of the manifest", flush=True)
    return 0


def _trained_reference(recipe: "Recipe", runs_dir: Path) -> Path | None:
    """The exported model of a reference that is a recipe; None before it is trained."""
    name = recipe.reference.recipe_name if recipe.reference is not None else None
    if name is None:
        return None
    from inheritune_ds.config.loading import load_recipe
    from inheritune_ds.run.folder import RunFolder

    inner = load_recipe(name)
    folder = RunFolder(runs_dir / inner.name)
    return folder.export if folder.has_finished(inner) else None


def _table(tokens: "TokenSet") -> str:
    """Format the manifest's counts of every source."""
    row = "{:<24}{:>18}{:>18}{:>13}{:>10}{:>12}".format
    lines = [
        f"tokens: {tokens.folder} ({tokens.token_dtype}, {len(tokens.manifest['files'])} files)",
        row("source", "training tokens", "held-out tokens", "documents", "held out", "duplicates"),
    ]
    for source in tokens.manifest["sources"]:
        keys = ("train_tokens", "validation_tokens", "documents", "validation_documents", "duplicate_documents")
        lines.append(row(source["name"], *(f"{source[key]:,}" for key in keys)))
    for source in tokens.manifest["sources"]:
        reasons = {"empty": "empty_documents", "filtered": "filtered_documents", "bad": "bad_records"}
        if skipped := ", ".join(f"{source[key]:,} {reason}" for reason, key in reasons.items() if source[key]):
            first = f" (first bad record: {source['first_bad_record']})" if source["first_bad_record"] else ""
            lines.append(f"skipped in {source['name']}: {skipped}{first}")
        if names := source["left_out_files"]:
            lines.append(f"{source['name']}: {len(names):,} files of other kinds were skipped, such as {names[0]}")
        if source["forced_cuts"]:
            lines.append(f"{source['name']}: {source['forced_cuts']:,} cuts that may have changed a few tokens each")
        if not source["train_tokens"]:
            lines.append(f"WARNING: {source['name']} has no training token: empty, held out, or after max_tokens")
    for name, found in (tokens.manifest["overlap"] or {}).items():
        lines.append(
            f"overlap with {name}: {found['items_hit']:,} of {found['items']:,} items occur in "
            f"{found['documents_hit']:,} training documents"
        )
    return "\n".join(lines)
