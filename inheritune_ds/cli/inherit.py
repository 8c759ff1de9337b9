"""`inheritune-ds inherit`."""

import argparse
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inheritune_ds.recipe import Reference, Target
    from inheritune_ds.surgery.inherit import Previous


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--reference", required=True, help="hub id, local folder, or recipe:NAME (its export)")
    parser.add_argument("--revision", default="main", help="hub only: commit, tag or branch (default: main)")
    parser.add_argument("--select", required=True, help="first:13, last:2, even:6, drop:20-25, 0-7,20-23, ...")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the target; must be new")
    parser.add_argument(
        "--inherit", default="all", help="a preset (default: all) or a list of parts: attention,mlp,head"
    )
    parser.add_argument("--width", choices=("full", "half"), default="full", help="half: the paper's baseline")
    parser.add_argument("--block-scores", metavar="JSON", help="scores of the blocks, for --select by:NAME:n")
    parser.add_argument("--dropout", type=float, default=0.0, help="written to the target's config (default: 0)")
    parser.add_argument("--seed", type=int, default=1337, help="of the fresh tensors' values (default: 1337)")
    parser.add_argument(
        "--previous", type=Path, metavar="DIR", help="growth: keep the trained blocks of this smaller target"
    )
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where recipe:NAME is looked for")
    parser.epilog = "docs/surgery.md tells the grammar of selections, the parts and presets, and what is proven."


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """Build the target; the same command again finds it built."""
    from inheritune_ds.errors import RecipeError
    from inheritune_ds.training.world import prepare_environment

    if not 0 <= args.seed < 2**32:
        raise RecipeError(f"--seed {args.seed} is no seed", allowed=f"0 to {2**32 - 1}")
    if overrides:
        raise RecipeError(
            f"inherit takes no overrides: {' '.join(overrides)}",
            action="inheritune-ds inherit --help lists its options",
        )
    reference, target = _request(args)
    # The surgery computes on the CPU; a GPU machine need not have its GPU free for it.
    prepare_environment(os.environ, kind="cpu")
    from inheritune_ds.files import read_json
    from inheritune_ds.surgery.inherit import MANIFEST, build_target, find_target
    from inheritune_ds.surgery.reference import load_config, locate, own_tokenizer
    from inheritune_ds.surgery.scores import read_scores

    located = locate(reference, lambda name: args.runs_dir / name / "export")
    previous = _previous(args)
    identity: dict[str, Any] = {
        "reference": located.identity,
        "previous": previous and previous.identity,
        "target": target.model_dump(mode="json"),
        "block_scores": read_scores(target.block_scores),
        "seed": args.seed,
    }
    found = find_target(args.output, identity)
    if found is None:
        _check_output(args.output, is_ours=read_json(args.output / MANIFEST) is not None)
        found = build_target(
            target,
            reference=None if target.inherits_nothing else located,
            reference_config=load_config(located.folder),
            tokenizer=own_tokenizer(located.folder),
            seed=args.seed,
            folder=args.output,
            identity=identity,
            command=_command(args, located.commit),
            say=lambda line: print(line, flush=True),
            previous=previous,
        )
    print(_summary(found.report, args.output))
    return 0


def _request(args: argparse.Namespace) -> "tuple[Reference, Target]":
    """The same models as a recipe's, so that both are checked alike."""
    from pydantic import ValidationError

    from inheritune_ds.errors import RecipeError
    from inheritune_ds.parts import PRESETS
    from inheritune_ds.recipe import Reference, Target

    try:
        return Reference(model=args.reference, revision=args.revision), Target(
            select=args.select,
            inherit=args.inherit if args.inherit in PRESETS else args.inherit.split(","),
            width=args.width,
            block_scores=args.block_scores,
            dropout=args.dropout,
        )
    except ValidationError as error:
        problems = [
            RecipeError(f"--{str(problem['loc'][0]).replace('_', '-')}: {problem['msg'].removeprefix('Value error, ')}")
            for problem in error.errors()
        ]
        raise RecipeError.of(problems) from None


def _previous(args: argparse.Namespace) -> "Previous | None":
    from inheritune_ds.surgery.inherit import locate_previous

    return None if args.previous is None else locate_previous(args.previous)


def _check_output(output: Path, *, is_ours: bool) -> None:
    from inheritune_ds.errors import RunFolderError

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        what = "holds a target that was built from something else" if is_ours else "exists and is not empty"
        raise RunFolderError(f"--output {output} {what}", action="name a new folder, or remove this one")


def _command(args: argparse.Namespace, commit: str) -> str:
    words = ["inheritune-ds", "inherit", "--reference", args.reference, "--select", args.select]
    words += ["--revision", commit] if commit else []
    for name, default in (("inherit", "all"), ("width", "full"), ("dropout", 0.0), ("seed", 1337)):
        value = getattr(args, name)
        words += [f"--{name}", str(value)] if value != default else []
    words += ["--block-scores", args.block_scores] if args.block_scores else []
    words += ["--previous", str(args.previous)] if args.previous else []
    return shlex.join([*words, "--output", "DIR"])


def _summary(report: Any, output: Path) -> str:
    tensors = report["tensors"]
    fresh = sum(not tensor["inherited"] for tensor in tensors)
    state = report["proof"]["hidden_state"] or report["proof"]["hidden_state_reason"]
    left_out = ", ".join(report["left_out"][:3]) + (", ..." if len(report["left_out"]) > 3 else "")
    rows = {
        "blocks": f"{report['blocks']}: {report['selection']} of the reference",
        "parameters": f"{report['parameters']:,}, {report['block_parameters']:,} of them in blocks",
        "inherited": f"{len(tensors) - fresh} of {len(tensors)} tensors, {report['inherited_parameters']:,} parameters",
        "hidden state": state,
        **({"left out": f"{left_out}: the model has no place for them"} if left_out else {}),
        "target": str(output),
        "report": str(output / "inheritance.json"),
    }
    return "\n".join(f"  {name:<13} {value}" for name, value in rows.items())
