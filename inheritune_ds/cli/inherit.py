"""`inheritune-ds inherit`."""

import argparse
import os
import shlex
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inheritune_ds.cli.options import add_runs_dir
from inheritune_ds.console import log_to_console
from inheritune_ds.errors import RecipeError, RunFolderError
from inheritune_ds.storage.files import read_json, storage_errors
from inheritune_ds.storage.folders import damaged_files

if TYPE_CHECKING:
    from inheritune_ds.config.model import Reference, Target
    from inheritune_ds.surgery.inherit import TargetModel
    from inheritune_ds.surgery.reference import ReferenceModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--reference", required=True, help="hub id, local folder, or recipe:NAME (its export)")
    parser.add_argument("--revision", default="main", help="hub only: commit, tag or branch (default: main)")
    parser.add_argument("--select", required=True, help="first:13, last:2, even:6, drop:20-25, 0-7,20-23, ...")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the target; must be new or empty")
    parser.add_argument(
        "--inherit", default="all", help="a preset (default: all) or a list of parts: attention,mlp,head"
    )
    parser.add_argument("--width", choices=("full", "half"), default="full", help="half: the paper's baseline")
    parser.add_argument("--block-scores", metavar="JSON", help="scores of the blocks, for --select by:NAME:n")
    parser.add_argument("--dropout", type=float, default=0.0, help="dropout in the target's config (default: 0)")
    parser.add_argument("--seed", type=int, default=1337, help="seed of the fresh tensors (default: 1337)")
    parser.add_argument("--previous", metavar="DIR", help="growth: keep the trained blocks of this smaller target")
    add_runs_dir(parser)
    parser.epilog = "docs/reference/surgery.md lists the grammar of selections, the parts and the presets."


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """Build the target, or verify it if it is built already."""
    from inheritune_ds.distributed.environment import prepare_environment

    if not 0 <= args.seed < 2**32:
        raise RecipeError(f"--seed {args.seed} is not a seed", allowed=f"0 to {2**32 - 1}")
    if overrides:
        action = "inheritune-ds inherit --help lists its options"
        raise RecipeError(f"inherit takes no overrides: {' '.join(overrides)}", action=action)
    output = _output(args.output)
    reference, target = _request(args)
    local = _local_folder(reference, args.runs_dir)
    if local is not None and reference.revision != "main":
        text = f"--revision {reference.revision} is for models of the hub, --reference {reference.model} is a folder"
        raise RecipeError(text, action="remove --revision")
    for role, folder in (("reference", local), ("previous", args.previous and Path(args.previous).expanduser())):
        if folder:
            _check_outside(args, output, role, folder)
    # Surgery computes on the CPU, so no GPU needs to be free.
    prepare_environment(os.environ, kind="cpu")
    log_to_console()
    with _stoppable():
        _build(args, output, reference, target, local)
    return 0


def _build(
    args: argparse.Namespace, output: Path, reference: "Reference", target: "Target", local: Path | None
) -> None:
    """Make the quick checks, then hash the reference, then find or build the target."""
    from inheritune_ds.config.block_scores import read_scores
    from inheritune_ds.surgery.inherit import Cut, build_target, make_config
    from inheritune_ds.surgery.load import load_config, own_tokenizer
    from inheritune_ds.surgery.reference import locate, read_config
    from inheritune_ds.surgery.report import target_summary

    known: dict[str, Any] = {
        "target": target.model_dump(mode="json"),
        "block_scores": read_scores(target.block_scores),
        "seed": args.seed,
    }
    _check_output(args.output, output, {**known, "reference": reference.model})
    if local is not None:
        read_config(local, reference.model)
        make_config(target, load_config(local))
    previous = _previous(args)
    located = locate(reference, lambda name: args.runs_dir / name / "export")
    _check_outside(args, output, "reference", located.folder)
    identity = {"reference": located.identity, "previous": previous and previous.weights_identity, **known}
    found = _find(args.output, output, identity)
    if found is not None:
        print(f"{target_summary(found.report, Path(args.output))}\n  state         built before, files verified")
        return
    cut = Cut(
        target=target,
        seed=args.seed,
        identity=identity,
        command=_command(args, located.commit),
        reference=None if target.inherits_nothing else located,
        reference_config=load_config(located.folder),
        previous=previous,
        tokenizer=own_tokenizer(located.folder),
        tokenizer_source=located.folder,
    )
    print(target_summary(build_target(cut, output, replace=False).report, Path(args.output)))


@contextmanager
def _stoppable() -> Iterator[None]:
    """Handle SIGTERM, SIGUSR1 and SIGHUP like Ctrl-C, so that the half-built folder is removed."""
    from inheritune_ds.distributed.signals import SIGNALS, StopSignal

    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop = StopSignal()
    stop.install()
    try:
        with stop.interruptible():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _output(text: str) -> Path:
    """Resolve the target's folder; refuse the current one, which the shell would lose."""
    if not text:
        raise RecipeError("--output is empty", allowed="a folder that is new or empty")
    output = Path(os.path.realpath(Path(text).expanduser()))
    if output == Path(os.path.realpath(".")):
        raise RunFolderError(f"--output {text} is the current folder", action="name a new folder, such as ./target")
    return output


def _local_folder(reference: "Reference", runs_dir: Path) -> Path | None:
    """Find the folder of a local reference; None for a model of the hub."""
    from inheritune_ds.config.fields import is_local_path

    if (name := reference.recipe_name) is not None:
        if not name or "/" in name or name.startswith("."):
            raise RecipeError(
                f"--reference {reference.model} is not the name of a recipe",
                allowed="recipe:NAME with the name of a run, or the path of a model's folder",
            )
        export = runs_dir / name / "export"
        if not export.is_dir():
            raise RecipeError(
                f"--reference {reference.model} has not been trained: {export} is missing",
                action=f"train it first: inheritune-ds train --recipe {name} --runs-dir {runs_dir}",
            )
        return export
    folder = Path(reference.model).expanduser()
    if folder.is_dir():
        return folder
    if is_local_path(reference.model):
        raise RecipeError(
            f"--reference {reference.model}: there is no folder {folder}",
            allowed="a model's folder, recipe:NAME, or a hub id, which has one slash: openlm-research/open_llama_3b",
        )
    return None


def _check_outside(args: argparse.Namespace, output: Path, role: str, folder: Path) -> None:
    whole = Path(os.path.realpath(folder))
    if whole == output or whole in output.parents:
        text = f"--output {args.output} is inside the folder of --{role}, {folder}"
        raise RunFolderError(text, action="name a folder outside of it")


def _check_output(name: str, output: Path, known: Mapping[str, Any]) -> None:
    """Refuse a folder with other content early, by what is known before the reference is hashed."""
    from inheritune_ds.surgery.inherit import MANIFEST

    with storage_errors(output):
        if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
            return
    manifest = read_json(output / MANIFEST)
    if not isinstance(manifest, dict):
        raise _in_use(name, "exists and is not empty")
    identity = manifest.get("identity")
    found = dict(identity) if isinstance(identity, dict) else {}
    reference = found.get("reference")
    found["reference"] = reference.get("name") if isinstance(reference, dict) else None
    if any(found.get(key) != value for key, value in known.items()):
        raise _in_use(name, "holds a target that was built from something else")


def _find(name: str, output: Path, identity: Mapping[str, Any]) -> "TargetModel | None":
    """Find the built target; None if it is to be built, which may replace a damaged one."""
    from inheritune_ds.surgery.inherit import MANIFEST, find_target, may_replace

    found = find_target(output, identity, verify=True)
    manifest = read_json(output / MANIFEST)
    if found is not None or not isinstance(manifest, dict):
        return found
    if manifest.get("identity") != identity:
        raise _in_use(name, "holds a target that was built from something else")
    damaged = ", ".join(damaged_files(output, manifest.get("files"), hashes=True)[:3])
    if not may_replace(output, identity):
        raise _in_use(name, f"holds other files beside this target, and it is damaged ({damaged})")
    print(f"DAMAGED: {name} holds this target with damaged files ({damaged}); it is rebuilt", flush=True)
    return None


def _in_use(name: str, what: str) -> RunFolderError:
    return RunFolderError(f"--output {name} {what}", action="name a new folder, or remove this one")


def _request(args: argparse.Namespace) -> "tuple[Reference, Target]":
    """Validate the options with the models of a recipe."""
    from pydantic import ValidationError

    from inheritune_ds.config.inheritance import PRESETS
    from inheritune_ds.config.model import Reference, Target

    if not args.inherit:
        raise RecipeError("--inherit is empty", allowed=f"{', '.join(PRESETS)}, or a list of parts: attention,mlp,head")
    if args.inherit == "moments":
        raise RecipeError(
            "--inherit moments is for training: a cut model has no optimizer state",
            allowed=", ".join(name for name in PRESETS if name != "moments"),
            action="write --inherit all here, and target.inherit: moments in the recipe",
        )
    # The same folder is the same reference in every spelling.
    model = str(Path(args.reference)) if args.reference and Path(args.reference).is_dir() else args.reference
    try:
        return Reference(model=model, revision=args.revision), Target(
            select=args.select,
            inherit=args.inherit if args.inherit in PRESETS else args.inherit.split(","),
            width=args.width,
            block_scores=args.block_scores,
            dropout=args.dropout,
        )
    except ValidationError as error:
        options = {"model": "reference", "Reference": "reference", "Target": "select", "block_scores": "block-scores"}
        fields = [(str((*problem["loc"], error.title)[0]), problem["msg"]) for problem in error.errors()]
        texts = [f"--{options.get(field, field)}: {text.removeprefix('Value error, ')}" for field, text in fields]
        raise RecipeError.of([RecipeError(text) for text in texts]) from None


def _previous(args: argparse.Namespace) -> "ReferenceModel | None":
    from inheritune_ds.surgery.inherit import locate_previous

    if args.previous is None:
        return None
    folder = Path(args.previous).expanduser()
    if not args.previous or not (folder / "config.json").is_file():
        text = f"--previous {args.previous!r} is not a model folder"
        raise RecipeError(text, allowed="the folder of an earlier, trained target")
    return locate_previous(folder)


def _command(args: argparse.Namespace, commit: str) -> str:
    words = ["inheritune-ds", "inherit", "--reference", args.reference, "--select", args.select]
    words += ["--revision", commit] if commit else []
    for name, default in (("inherit", "all"), ("width", "full"), ("dropout", 0.0), ("seed", 1337)):
        value = getattr(args, name)
        words += [f"--{name}", str(value)] if value != default else []
    words += ["--block-scores", args.block_scores] if args.block_scores else []
    words += ["--previous", str(args.previous)] if args.previous else []
    return shlex.join([*words, "--output", "DIR"])
