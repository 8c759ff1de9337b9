"""`inheritune-ds checkpoints`."""

import argparse
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inheritune_ds.checkpoints.store import CheckpointStore
    from inheritune_ds.run.folder import RunFolder

_MB = 1e6
_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))
_TITLES = ("checkpoint", "tokens", "size", "age", "saved under", "stays")


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
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="run folders stand here (default: runs)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--keep", type=int, metavar="N", help="prune: keep the newest N instead of the recipe's number")
    which.add_argument(
        "--after", type=int, metavar="STEP", help="prune: delete those later than STEP instead: the run goes back"
    )
    parser.add_argument("--dry-run", action="store_true", help="prune: tell what would be deleted, delete nothing")
    parser.epilog = "Exit code 4 if a checkpoint is damaged (verify), or the newest that prune would leave."


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """List, verify or prune the checkpoints of a run."""
    from inheritune_ds.checkpoints.store import CheckpointStore
    from inheritune_ds.errors import RecipeError

    if overrides:
        raise RecipeError(
            f"checkpoints takes no overrides: {' '.join(overrides)}",
            action="--keep N says how many stay; the recipe says it for a run",
        )
    pruning = [name for name in ("keep", "after", "dry_run") if getattr(args, name) not in (None, False)]
    if pruning and args.action != "prune":
        raise RecipeError(
            f"--{pruning[0].replace('_', '-')} says what `prune` does, and `{args.action}` is asked for",
            action="write prune behind the run",
        )
    if args.keep is not None and args.keep < 1:
        raise RecipeError(f"--keep {args.keep} would leave no checkpoint", allowed="1 or more")
    folder = _run_folder(args.run, args.runs_dir)
    rule = folder.resolved_recipe().checkpoint
    if args.keep is not None:
        rule = rule.model_copy(update={"keep": args.keep})
    store = CheckpointStore.of(folder.checkpoints, rule)
    store.newest()  # tells that the folder cannot be read
    if args.action == "prune":
        _prune(folder, store, args)
    elif args.action == "verify":
        _verify(store)
    else:
        _list(store)
    return 0


def _run_folder(named: str, runs_dir: Path) -> "RunFolder":
    from inheritune_ds.errors import RunFolderError
    from inheritune_ds.run.folder import RunFolder

    for path in (Path(named).expanduser(), runs_dir / named):
        if (path / "recipe.resolved.yaml").is_file():
            return RunFolder(path)
    there = sorted(path.parent.name for path in runs_dir.glob("*/recipe.resolved.yaml"))
    raise RunFolderError(
        f"{named} is no run: neither there nor in {runs_dir} stands a recipe.resolved.yaml",
        allowed=f"a run folder, or one of {', '.join(there)}" if there else "a run folder",
        action="give the run's folder, or its name and --runs-dir DIR",
    )


def _list(store: "CheckpointStore") -> None:
    from inheritune_ds.checkpoints.manifest import POINTER, pointer_fault, published
    from inheritune_ds.checkpoints.retention import kept

    staying, found = kept(store), list(published(store.folder))
    if not found:
        print(f"no checkpoint in {store.folder}")
        return
    table = [_TITLES, *((path.name, *_told(path), staying.get(path, "no: prune deletes it")) for path in found)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    fault = pointer_fault(store.folder)
    pointer = store.folder / POINTER
    print(f"{pointer} {fault or 'names ' + pointer.read_text(encoding='utf-8').strip()}")


def _told(checkpoint: Path) -> tuple[str, str, str, str]:
    """Tokens, size, age and layout of a checkpoint, as its manifest tells them; no file of it is read."""
    from inheritune_ds.checkpoints.manifest import read_manifest

    try:
        age = _age(time.time() - checkpoint.lstat().st_mtime)
    except FileNotFoundError:  # by the run, which goes on meanwhile
        return "?", "?", "?", "just deleted"
    if checkpoint.is_symlink():
        return "?", "?", age, f"DAMAGED: a symbolic link{'' if checkpoint.exists() else ' to what is not there'}"
    manifest = read_manifest(checkpoint)
    if manifest is None:
        return "?", "?", age, "DAMAGED: no manifest as it was written"
    layout = manifest["layout"]
    saved_under = f"{_count(layout['world_size'], 'rank')}, ZeRO-{layout['zero_stage']}, {layout['precision']}"
    return f"{manifest['state']['tokens']:,}", _size(manifest), age, saved_under


def _size(manifest: dict[str, Any]) -> str:
    return f"{_bytes(manifest) / _MB:,.1f} MB"


def _bytes(manifest: dict[str, Any]) -> int:
    return sum(entry["bytes"] for entry in manifest["files"].values())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _age(seconds: float) -> str:
    unit_s, unit = next(((size, name) for size, name in _UNITS if seconds >= size), _UNITS[-1])
    return f"{seconds / unit_s:.0f} {unit}"


def _verify(store: "CheckpointStore") -> None:
    from inheritune_ds.checkpoints.manifest import published, read_manifest
    from inheritune_ds.errors import CheckpointError

    store.refuse_untrusted()
    found, bad = list(published(store.folder)), 0
    for checkpoint in found:
        manifest = read_manifest(checkpoint) or {"files": {}}
        fault = _read_back(checkpoint, _bytes(manifest))
        told = (
            f"intact ({_count(len(manifest['files']), 'file')}, {_size(manifest)})"
            if fault is None
            else f"DAMAGED: {fault}"
        )
        print(f"{checkpoint.name}  {told}", flush=True)
        bad += fault is not None
    if not found:
        store.newest_intact(print)  # it refuses a run that has saved before
        print(f"no checkpoint in {store.folder}")
    if bad:
        raise CheckpointError(
            f"{bad} of {len(found)} checkpoints in {store.folder} are damaged",
            action="bring intact copies back, or remove the damaged folders; a run passes over them",
        )


def _read_back(checkpoint: Path, total: int) -> str | None:
    from inheritune_ds.checkpoints.manifest import find_fault
    from inheritune_ds.console import Meter

    lock = threading.Lock()  # files are hashed side by side
    with Meter(f"reading {checkpoint.name}", "bytes", total) as meter:

        def advance(count: int) -> None:
            with lock:
                meter.advance(count)

        return find_fault(checkpoint, advance)


def _prune(folder: "RunFolder", store: "CheckpointStore", args: argparse.Namespace) -> None:
    from inheritune_ds.checkpoints import retention
    from inheritune_ds.checkpoints.manifest import newest_step
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
            deleted = [checkpoint for checkpoint in retention.expired(store) if retention.remove(checkpoint, print)]
        else:
            deleted = retention.go_back(store, args.after, print)
            if deleted:  # a run that had finished would not go on otherwise
                step = newest_step(store.folder)
                reason = f"brought back to step {step} by `checkpoints prune`"
                write_status(folder.path, "requeue", step=step, reason=reason)
        for checkpoint in deleted:
            print(f"{checkpoint.name}  deleted")
        # Whatever was deleted, the newest of the others was read back first.
        print(f"{len(deleted)} deleted{f'; the run goes on from step {newest_step(store.folder)}' if deleted else ''}")
    finally:
        folder.release()
