"""`inheritune-ds checkpoints`."""

import argparse
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inheritune_ds.checkpoints import retention
from inheritune_ds.checkpoints.manifest import (
    EARLIER,
    POINTER,
    find_fault,
    newest_step,
    pointer_fault,
    published,
    read_manifest,
)
from inheritune_ds.checkpoints.store import CheckpointStore, earlier_format
from inheritune_ds.cli.options import add_runs_dir
from inheritune_ds.console import Meter, log_to_console
from inheritune_ds.errors import CheckpointError, RecipeError, RunFolderError

if TYPE_CHECKING:
    from inheritune_ds.run.folder import RunFolder

_TITLES = ("checkpoint", "tokens", "size", "age", "saved under", "kept")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("run", metavar="RUN", help="a run folder, or its name below --runs-dir")
    parser.add_argument(
        "action",
        nargs="?",
        choices=("list", "verify", "prune"),
        default="list",
        help="list them (default); verify: read every file and compare hashes; prune: delete by the recipe's rule",
    )
    add_runs_dir(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--keep", type=int, metavar="N", help="prune: keep the newest N instead of the recipe's number")
    which.add_argument("--after", type=int, metavar="STEP", help="prune: delete those later than STEP instead")
    parser.add_argument("--dry-run", action="store_true", help="prune: list what would be deleted, delete nothing")
    parser.epilog = "Exit code 4 if a checkpoint is damaged (verify), or the newest that prune would keep."


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """List, verify or prune the checkpoints of a run."""
    if overrides:
        action = "set the number to keep by --keep N, or checkpoint.keep in the recipe of a run"
        raise RecipeError(f"checkpoints takes no overrides: {' '.join(overrides)}", action=action)
    pruning = [name for name in ("keep", "after", "dry_run") if getattr(args, name) not in (None, False)]
    if pruning and args.action != "prune":
        text = f"--{pruning[0].replace('_', '-')} is an option of `prune`, not of `{args.action}`"
        raise RecipeError(text, action="write prune after the run")
    if args.keep is not None and args.keep < 1:
        raise RecipeError(f"--keep {args.keep} would delete every checkpoint", allowed="1 or more")
    folder = _run_folder(args.run, args.runs_dir)
    rule = folder.resolved_recipe().checkpoint
    if args.keep is not None:
        rule = rule.model_copy(update={"keep": args.keep})
    store = CheckpointStore.of(folder.checkpoints, rule)
    store.newest()  # refuses an unreadable folder
    log_to_console()
    if args.action == "prune":
        _prune(folder, store, args)
    elif args.action == "verify":
        _verify(store)
    else:
        _list(store)
    return 0


def _run_folder(named: str, runs_dir: Path) -> "RunFolder":
    from inheritune_ds.run.folder import RunFolder

    for path in (Path(named).expanduser(), runs_dir / named):
        if (path / "recipe.resolved.yaml").is_file():
            return RunFolder(path)
    there = sorted(path.parent.name for path in runs_dir.glob("*/recipe.resolved.yaml"))
    raise RunFolderError(
        f"{named} is not a run: it has no recipe.resolved.yaml, neither there nor in {runs_dir}",
        allowed=f"a run folder, or one of {', '.join(there)}" if there else "a run folder",
        action="give the run's folder, or its name and --runs-dir DIR",
    )


def _list(store: CheckpointStore) -> None:
    reasons, found = retention.kept(store), list(published(store.folder))
    if not found:
        print(f"no checkpoint in {store.folder}")
        return
    table = [_TITLES, *((path.name, *_describe(path), reasons.get(path, "no: prune deletes it")) for path in found)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    fault = pointer_fault(store.folder)
    pointer = store.folder / POINTER
    print(f"{pointer} {fault or 'names ' + pointer.read_text(encoding='utf-8').strip()}")


def _describe(checkpoint: Path) -> tuple[str, str, str, str]:
    """Tokens, size, age and layout of a checkpoint, by its manifest."""
    try:
        age = _age(time.time() - checkpoint.lstat().st_mtime)
    except FileNotFoundError:  # by a running run
        return "?", "?", "?", "just deleted"
    if checkpoint.is_symlink():
        return "?", "?", age, f"DAMAGED: a {'' if checkpoint.exists() else 'dangling '}symbolic link"
    manifest = read_manifest(checkpoint)
    if manifest is None:
        return "?", "?", age, "DAMAGED: manifest missing or changed"
    layout = manifest["layout"]
    saved_under = f"{_count(layout['world_size'], 'rank')}, ZeRO-{layout['zero_stage']}, {layout['precision']}"
    return f"{manifest['state']['tokens']:,}", f"{_bytes(manifest) / 1e6:,.1f} MB", age, saved_under


def _bytes(manifest: Mapping[str, Any]) -> int:
    return sum(entry["bytes"] for entry in manifest["files"].values())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _age(seconds: float) -> str:
    units = {"d": 86400.0, "h": 3600.0, "min": 60.0, "s": 1.0}
    unit = next((unit for unit, size_s in units.items() if seconds >= size_s), "s")
    return f"{seconds / units[unit]:.0f} {unit}"


def _verify(store: CheckpointStore) -> None:
    store.refuse_untrusted()
    found, bad, lock = list(published(store.folder)), 0, threading.Lock()  # several threads hash files
    for checkpoint in found:
        manifest = read_manifest(checkpoint) or {"files": {}}
        with Meter(f"reading {checkpoint.name}", "bytes", _bytes(manifest)) as meter:

            def advance(count: int, meter: Meter = meter) -> None:
                with lock:
                    meter.advance(count)

            fault = find_fault(checkpoint, advance)
        if fault == EARLIER:
            raise earlier_format(checkpoint)
        intact = f"intact ({_count(len(manifest['files']), 'file')}, {_bytes(manifest) / 1e6:,.1f} MB)"
        print(f"{checkpoint.name}  {intact if fault is None else f'DAMAGED: {fault}'}", flush=True)
        bad += fault is not None
    if not found:
        store.newest_intact()  # refuses a run that has saved before
        print(f"no checkpoint in {store.folder}")
    if bad:
        raise CheckpointError(
            f"{bad} of {len(found)} checkpoints in {store.folder} are damaged",
            action="restore intact copies, or remove the damaged folders; a run skips them",
        )


def _prune(folder: "RunFolder", store: CheckpointStore, args: argparse.Namespace) -> None:
    from inheritune_ds.run.status import write_status

    folder.lock()
    try:
        store.refuse_untrusted()
        if args.dry_run:
            old = retention.expired(store) if args.after is None else retention.later_than(store, args.after)
            for checkpoint in old:
                print(f"{checkpoint.name}  would be deleted")
            print(f"{len(old)} would be deleted")
            return
        if args.after is None:
            deleted = [checkpoint for checkpoint in retention.expired(store) if retention.remove(checkpoint)]
        else:
            deleted = retention.go_back(store, args.after)
            if deleted:  # a finished run resumes only with another status
                step = newest_step(store.folder)
                write_status(
                    folder.path, "requeue", step=step, reason=f"returned to step {step} by `checkpoints prune`"
                )
        for checkpoint in deleted:
            print(f"{checkpoint.name}  deleted")
        print(f"{len(deleted)} deleted{f'; the run resumes from step {newest_step(store.folder)}' if deleted else ''}")
    finally:
        folder.release()
