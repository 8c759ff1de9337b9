"""The run folder: its layout, its lock, and the recipe that it belongs to."""

import fcntl
import os
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

EXPORT_MANIFEST = "manifest.json"
"""In an export: the fingerprint of its recipe, and its files."""


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

    @property
    def is_claimed(self) -> bool:
        """Whether this process has the folder."""
        return self._lock is not None

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
            self.release()  # it belongs to another recipe, and so does its status
            raise
        self.write_resolved(with_known_pins(recipe, self.path))
        for folder in (self.eval, self.checkpoints):
            with storage_errors(folder):
                folder.mkdir(mode=0o775, exist_ok=True)  # whatever the umask: nothing is loaded that all can write to
        for folder in (self.path, self.eval, self.path / "report"):  # the store cleans the checkpoints' folder
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

    def release(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def set_aside(self) -> Path | None:
        """Rename the folder, so that a run starts over under the old name; nothing is deleted.

        Returns:
            The new path of the old run, beside this one; None if there was none.

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
        resolved, text = self.path / identity.RESOLVED_RECIPE, dump_recipe(recipe)
        if not resolved.exists() or resolved.read_bytes() != text.encode():
            write_exact(resolved, text)  # a recipe that holds a secret has been refused

    def resolved_recipe(self) -> Recipe:
        """The recipe that this folder belongs to.

        Raises:
            RunFolderError: If it cannot be read any more.
        """
        path = self.path / identity.RESOLVED_RECIPE
        try:
            return validate(Recipe, parse_yaml(path.read_text(encoding="utf-8"), str(path)), str(path))
        except (OSError, UnicodeDecodeError, RecipeError) as error:
            reason = error.problem if isinstance(error, RecipeError) else f"{path}: {error}"
            raise RunFolderError(
                f"the recipe of this run is not as it was written: {reason}",
                action=f"bring {path} back, or start over with --fresh, which sets the old run aside",
            ) from None

    def _check_owner(self, recipe: Recipe) -> None:
        trained = (self.path / "metrics.jsonl").exists() or identity.has_begun(self.path)
        if trained and (self.path / identity.RESOLVED_RECIPE).exists():
            identity.check_recipe(self.path, self.resolved_recipe(), recipe)
        # A recipe that failed before its first step leaves nothing that a corrected one could spoil.

    def has_finished(self, recipe: Recipe) -> bool:
        """Whether a recipe was trained here to its end: status, run.json and the export, its files checked by size."""
        if read_status(self.path).get("state") != "finished" or not (self.path / "run.json").is_file():
            return False
        manifest = read_json(self.export / EXPORT_MANIFEST)
        if manifest is None or manifest["recipe_fingerprint"] not in identity.fingerprints(self.path, recipe):
            return False
        return not damaged_files(self.export, manifest["files"])

    @property
    def finished_before(self) -> str:
        """The line on a run that had finished before this launch."""
        return f"{self.path.name}: finished before; see {self.path / 'report' / 'report.md'}"

    def newest_step(self) -> int:
        """Step of the newest checkpoint; the one of status.json if the disk does not answer."""
        try:
            return newest_step(self.checkpoints)
        except OSError:
            return int(read_status(self.path).get("step", 0))

    def mark(self, state: State, reason: str = "", *, exit_code: int = 0) -> None:
        """Write the state of the run and its newest step to status.json, on the rank that has claimed the folder.

        A disk that refuses it is ignored: the console shows what ended the run.
        """
        if self.is_claimed:
            with suppress(StorageError):
                write_status(self.path, state, step=self.newest_step(), reason=reason, exit_code=exit_code)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
