"""The run folder: layout, lock, and the recipe that it belongs to."""

import fcntl
import os
import time
from contextlib import suppress
from datetime import UTC, datetime
from itertools import chain, count
from pathlib import Path

from inheritune_ds.checkpoints.manifest import newest_step
from inheritune_ds.config.loading import dump_recipe
from inheritune_ds.config.messages import validate
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.config.yaml import parse_yaml
from inheritune_ds.errors import RecipeError, RunFolderError, StorageError
from inheritune_ds.run import identity
from inheritune_ds.run.pins import with_known_pins
from inheritune_ds.run.status import State, read_status, write_status
from inheritune_ds.storage.files import read_json, remove_leftovers, storage_errors, sync_path, write_exact
from inheritune_ds.storage.folders import damaged_files

SAME_ERROR_S = 3.0
"""Time for rank 0 to report an error that all ranks raise."""
EXPORT_MANIFEST = "manifest.json"
"""Of an export: the fingerprint of its recipe, and its files."""


class FolderBusyError(RunFolderError):
    """Another process is writing to the run folder."""


class RunFolder:
    """One run's folder, `<runs_dir>/<recipe name>`; `claim` creates it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    @property
    def target(self) -> Path:
        """The target before training."""
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

    @property
    def is_claimed(self) -> bool:
        """Whether this process has locked the folder."""
        return self._lock is not None

    def claim(self, recipe: Recipe) -> None:
        """Lock the folder for this process and assign it to a recipe.

        Raises:
            RunFolderError: If it belongs to another recipe; FolderBusyError if another process has locked it.
            StorageError: If it cannot be written.
        """
        self.lock()
        try:
            moved = self._check_owner(recipe)
        except RunFolderError:
            self.release()  # it belongs to another recipe, and so does its status
            raise
        if not moved:  # otherwise after the content is compared
            self.write_resolved(with_known_pins(recipe, self.path))
        for folder in (self.eval, self.checkpoints):
            with storage_errors(folder):
                folder.mkdir(mode=0o775, exist_ok=True)  # no world-writable folder, which loading refuses
        for folder in (self.path, self.eval, self.path / "report"):  # the store cleans up checkpoints/
            remove_leftovers(folder)

    def lock(self) -> None:
        """Lock the folder until this process ends or calls `release`.

        Raises:
            FolderBusyError: If another process has locked it.
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
            else:  # the folder was renamed between opening and locking
                os.close(lock)

    def release(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def set_aside(self) -> Path | None:
        """Rename the folder, so that a run starts over under the old name; the new path, None if there was none.

        Raises:
            FolderBusyError: If another process has locked it.
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
        """Write recipe.resolved.yaml if it differs."""
        resolved, text = self.path / identity.RESOLVED_RECIPE, dump_recipe(recipe)
        if not resolved.exists() or resolved.read_bytes() != text.encode():
            write_exact(resolved, text)  # recipes with secrets are refused earlier

    def resolved_recipe(self) -> Recipe:
        """The recipe that this folder belongs to.

        Raises:
            RunFolderError: If it cannot be read.
        """
        path = self.path / identity.RESOLVED_RECIPE
        try:
            return validate(Recipe, parse_yaml(path.read_text(encoding="utf-8"), str(path)), str(path))
        except (OSError, UnicodeDecodeError, RecipeError) as error:
            reason = error.problem if isinstance(error, RecipeError) else f"{path}: {error}"
            raise RunFolderError(
                f"the recipe of this run is damaged: {reason}",
                action=f"restore {path}, or start over with --fresh, which renames the old run folder",
            ) from None

    def _check_owner(self, recipe: Recipe) -> bool:
        """Refuse another recipe; whether this one names other places of models and data than the run had."""
        trained = (self.path / "metrics.jsonl").exists() or identity.has_begun(self.path)
        if trained and (self.path / identity.RESOLVED_RECIPE).exists():
            return identity.check_recipe(self.path, self.resolved_recipe(), recipe)
        return False  # a corrected recipe may reuse the folder of a run that failed before its first step

    def has_finished(self, recipe: Recipe) -> bool:
        """Whether a recipe has finished here: status, run.json, and the sizes of the export's files."""
        if read_status(self.path).get("state") != "finished" or not (self.path / "run.json").is_file():
            return False
        manifest = read_json(self.export / EXPORT_MANIFEST)
        if manifest is None or manifest["recipe_fingerprint"] not in identity.fingerprints(self.path, recipe):
            return False
        return not damaged_files(self.export, manifest["files"])

    def newest_step(self) -> int:
        """Step of the newest checkpoint; that of status.json if the disk cannot be read."""
        try:
            return newest_step(self.checkpoints)
        except OSError:
            return int(read_status(self.path).get("step", 0))

    def mark(self, state: State, reason: str = "", *, exit_code: int = 0) -> None:
        """Write state and newest step to status.json if this rank has locked the folder; ignore a disk that refuses."""
        if self.is_claimed:
            self._write(state, reason, exit_code)

    def mark_failed(self, reason: str, *, exit_code: int, rank: int) -> None:
        """Write this rank's failure like `mark`, unless another rank has reported its own in this launch.

        A rank above 0 may call it after rank 0 has locked the folder, and waits until rank 0 could report the same.
        """
        if rank:
            time.sleep(SAME_ERROR_S)
            reason = f"rank {rank}: {reason}"
        if (rank or self.is_claimed) and read_status(self.path).get("state") != "failed":
            self._write("failed", reason, exit_code)

    def _write(self, state: State, reason: str, exit_code: int) -> None:
        with suppress(StorageError):
            write_status(self.path, state, step=self.newest_step(), reason=reason, exit_code=exit_code)


def finished_before(run_dir: Path) -> str:
    """The log line for a run that has finished before this launch."""
    return f"{run_dir.name}: finished before; see {run_dir / 'report' / 'report.md'}"


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
