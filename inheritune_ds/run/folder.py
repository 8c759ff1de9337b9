"""The run folder: who owns it, what stands where, and its status."""

import fcntl
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

from inheritune_ds import __version__
from inheritune_ds.config.corpus import HubSource
from inheritune_ds.config.fields import is_local_path
from inheritune_ds.config.loading import differences, dump_recipe
from inheritune_ds.config.messages import validate
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.config.yaml import parse_yaml
from inheritune_ds.errors import RecipeError, RunFolderError
from inheritune_ds.storage import hub
from inheritune_ds.storage.files import (
    read_json,
    remove_leftovers,
    storage_errors,
    sync_path,
    write_exact,
    write_json,
)
from inheritune_ds.storage.folders import has_files
from inheritune_ds.storage.hub import RepoType
from inheritune_ds.storage.redaction import redact

RESOLVED_RECIPE = "recipe.resolved.yaml"
"""In a run folder: the recipe that it belongs to, with everything written out."""
EXPORT_MANIFEST = "manifest.json"
"""In an export: whose it is, and its files."""
State = Literal["preparing", "running", "finished", "requeue", "failed"]
PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "numpy", "safetensors")


class FolderBusyError(RunFolderError):
    """Another process is writing to the run folder."""


class RunFolder:
    """One run's folder, `<runs_dir>/<recipe name>`.

    Args:
        path: The folder; made by `claim`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    @property
    def target(self) -> Path:
        """The target as surgery made it."""
        return self.path / "target"

    @property
    def checkpoints(self) -> Path:
        """Published checkpoints."""
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        """The trained target as a Hugging Face folder."""
        return self.path / "export"

    @property
    def eval(self) -> Path:
        """Validation results."""
        return self.path / "eval"

    def claim(self, recipe: Recipe) -> None:
        """Make the folder this recipe's and this process's own.

        Raises:
            RunFolderError: If it belongs to another recipe; FolderBusyError if another process has it.
            StorageError: If it cannot be written.
        """
        self.lock()
        try:
            self._check_owner(recipe)
        except RunFolderError:
            self.release()  # it is not ours, and neither is its status
            raise
        self.write_resolved(with_revisions(recipe, self.pin_of))
        for folder in (self.eval, self.checkpoints):
            with storage_errors(folder):
                folder.mkdir(mode=0o775, exist_ok=True)  # whatever the umask: nothing is loaded that all can write to
        for folder in (self.path, self.eval, self.path / "report"):  # of the checkpoints' own their store takes care
            remove_leftovers(folder)

    def lock(self) -> None:
        """Make the folder this process's own until it ends or calls `release`.

        Raises:
            FolderBusyError: If another process has it.
            StorageError: If it cannot be written.
        """
        while self._lock is None:
            with storage_errors(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
                raise FolderBusyError(
                    f"another process is writing to {self.path}",
                    action="wait for it or stop it; or train elsewhere with --runs-dir DIR or name=OTHER",
                ) from None
            if _is_at(lock, self.path / ".lock"):
                self._lock = lock
            else:  # the folder was set aside between the opening and the locking
                os.close(lock)

    def set_aside(self) -> Path | None:
        """Rename the folder, so that a run starts over under the old name; nothing is deleted.

        Returns:
            Where the old run stands now, beside it; None if there was none.

        Raises:
            FolderBusyError: If another process has it.
            StorageError: If it cannot be renamed.
        """
        if not self.path.exists():
            return None
        self.lock()
        try:
            moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
            named = self.path.with_name(f"{self.path.name}.before-{moment}")
            candidates = chain([named], (named.with_name(f"{named.name}-{number}") for number in count(2)))
            aside = next(path for path in candidates if not path.exists())
            with storage_errors(self.path):
                self.path.rename(aside)
                sync_path(aside.parent)
        finally:
            self.release()
        return aside

    def write_resolved(self, recipe: Recipe) -> None:
        """Write recipe.resolved.yaml, unless it says the same already."""
        resolved, text = self.path / RESOLVED_RECIPE, dump_recipe(recipe)
        if not resolved.exists() or resolved.read_bytes() != text.encode():
            write_exact(resolved, text)  # a recipe that holds a secret has been refused

    def resolved_recipe(self) -> Recipe:
        """The recipe that this folder belongs to.

        Raises:
            RunFolderError: If it cannot be read any more.
        """
        path = self.path / RESOLVED_RECIPE
        try:
            return validate(Recipe, parse_yaml(path.read_text(encoding="utf-8"), str(path)), str(path))
        except (OSError, UnicodeDecodeError, RecipeError) as error:
            reason = error.problem if isinstance(error, RecipeError) else f"{path}: {error}"
            raise RunFolderError(
                f"the recipe of this run is not as it was written: {reason}",
                action=f"bring {path} back, or start over with --fresh, which sets the old run aside",
            ) from None

    def pin_of(self, kind: RepoType, name: str, revision: str) -> str:
        """The full commit that an earlier launch found for a revision on the hub; the revision itself if none did."""
        pins = read_json(self.path / "pins.json") or {}
        return str(pins.get(f"{kind} {name}@{revision}", revision))

    def pin(self, kind: RepoType, name: str, revision: str) -> str:
        """The full commit of a revision on the hub, found once and kept in pins.json.

        So a run never changes its reference or its data because somebody has pushed to a branch.

        Raises:
            HubError: If the hub has to be asked, and cannot be.
        """
        path = self.path / "pins.json"
        pins: dict[str, str] = read_json(path) or {}
        key = f"{kind} {name}@{revision}"
        if key not in pins:
            pins[key] = hub.resolve(name, revision, kind).commit
            write_json(path, pins)
        return pins[key]

    def _check_owner(self, recipe: Recipe) -> None:
        resolved = self.path / RESOLVED_RECIPE
        trained = (self.path / "metrics.jsonl").exists() or any(self.checkpoints.glob("step-*"))
        if not resolved.exists() or not trained:
            return  # a recipe that failed before its first step leaves nothing that a corrected one could spoil
        owner = self.resolved_recipe()
        pinned = with_revisions(recipe, self.pin_of)
        if owner.fingerprint not in (recipe.fingerprint, pinned.fingerprint):
            lines = "\n".join(f"    {line}" for line in differences(owner.identity, pinned.identity))
            raise RunFolderError(
                f"{self.path} belongs to another recipe; it differs in\n{lines}",
                action="give this run a name or folder of its own: name=OTHER or --runs-dir DIR",
            )

    @property
    def is_claimed(self) -> bool:
        """Whether this process has the folder."""
        return self._lock is not None

    def release(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def has_finished(self, recipe: Recipe) -> bool:
        """Whether a recipe was trained here to its end: status, run.json and the export, its files checked by size."""
        if self.status().get("state") != "finished" or not (self.path / "run.json").is_file():
            return False
        manifest = read_json(self.export / EXPORT_MANIFEST)
        if manifest is None or manifest["recipe_fingerprint"] != recipe.fingerprint:
            return False
        return has_files(self.export, manifest["files"])

    @property
    def finished_before(self) -> str:
        """The line that tells of a run that had finished before this launch."""
        return f"{self.path.name}: finished before; see {self.path / 'report' / 'report.md'}"

    def status(self) -> dict[str, Any]:
        """The last status written; empty if there is none."""
        found = read_json(self.path / "status.json")
        return found if isinstance(found, dict) else {}

    def write_status(self, state: State, *, step: int = 0, reason: str = "", exit_code: int = 0) -> None:
        """Write status.json: what scripts read to decide what comes next.

        Args:
            state: `requeue` means: the same command goes on.
            step: Of the newest checkpoint. The latest ever told here stays as `saved_step`: a run whose checkpoints
                have gone must not start over unnoticed.
            reason: Why the run is in this state, in words.
            exit_code: Of this process, where it has ended.
        """
        document = {
            "state": state,
            "step": step,
            "saved_step": max(step, self.status().get("saved_step", 0)),
            "reason": redact(reason),
            "exit_code": exit_code,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        # Exact but for the reason: scripts read the state, even where a secret happens to be that word.
        write_exact(self.path / "status.json", json.dumps(document, indent=2) + "\n")

    def write_provenance(self, extra: Mapping[str, Any]) -> None:
        """Write provenance.json: code, versions, machine and command of this launch; nothing of the environment."""
        write_json(
            self.path / "provenance.json",
            {
                "inheritune_ds": __version__,
                "git": _git_state(),
                "python": platform.python_version(),
                "packages": {name: metadata.version(name) for name in PACKAGES},
                "platform": platform.platform(),
                "host": socket.gethostname(),
                "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
                "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                **extra,
            },
        )


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _git_state() -> dict[str, Any] | None:
    """Commit of the checkout that this package runs from, and whether it was changed since; None outside one."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def with_revisions(recipe: Recipe, revision_of: Callable[[RepoType, str, str], str]) -> Recipe:
    """Put other revisions in place of those of a recipe's hub models and datasets.

    Args:
        recipe: The recipe.
        revision_of: Repository type, name and revision -> the revision to take.
    """
    reference, corpus = recipe.reference, recipe.corpus
    if reference is not None and not (reference.recipe_name or _is_folder(reference.model)):
        revision = revision_of("model", reference.model, reference.revision)
        reference = reference.model_copy(update={"revision": revision})

    def pinned(sources: Sequence[Any]) -> list[Any]:
        return [
            source.model_copy(update={"revision": revision_of("dataset", source.dataset, source.revision)})
            if isinstance(source, HubSource) and not _is_folder(source.dataset)
            else source
            for source in sources
        ]

    told = {"sources": pinned(corpus.sources), "overlap_with": pinned(corpus.overlap_with)}
    return recipe.model_copy(update={"reference": reference, "corpus": corpus.model_copy(update=told)})


def _is_folder(name: str) -> bool:
    return is_local_path(name) or Path(name).is_dir()
