"""A run's checkpoints on the disk: published by one rename, verified before use.

checkpoints/  step-00000100/  step-00000200/   each with manifest.json: sizes and hashes of all its files
              latest                           name of the newest one; for users and tools, never needed
              generation                       which launch may publish here
              .step-00000300.tmp/              being written; the next launch removes that of a killed one
"""

import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inheritune_ds.checkpoints.manifest import (
    EARLIER,
    FORMAT,
    MANIFEST,
    POINTER,
    Checkpoint,
    close_to_others,
    distrust,
    examine,
    listing_fault,
    manifest_text,
    pointer_fault,
    published,
    read_manifest,
)
from inheritune_ds.errors import CheckpointError, StorageError
from inheritune_ds.storage.files import read_json, storage_errors, sync_folder, sync_path, write_exact

if TYPE_CHECKING:
    from inheritune_ds.config.training import Checkpointing

logger = logging.getLogger(__name__)
GENERATION = "generation"
_REPLACED = ".replaced.tmp"
_START_OVER = "or start over with --fresh, which renames the old run folder"


def earlier_format(path: Path) -> CheckpointError:
    """The error for a checkpoint of an earlier format."""
    return CheckpointError(
        f"{path} cannot be loaded: {EARLIER}",
        allowed="checkpoints of this format; nothing was deleted",
        action=f"finish the run with that commit, {_START_OVER}",
    )


class CheckpointStore:
    """`checkpoints/` of a run folder; only rank 0 of the launch that has locked the run folder changes it.

    The `keep` newest are kept, and those at multiples of `keep_every` steps, if that is not None.
    """

    def __init__(self, folder: Path, *, keep: int, keep_every: int | None = None) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self._generation = 0
        self._claim = ""

    @classmethod
    def of(cls, folder: Path, rule: "Checkpointing") -> "CheckpointStore":
        """The store of a recipe, whose `keep_every` counts checkpoints instead of steps."""
        every = rule.keep_every
        return cls(folder, keep=rule.keep, keep_every=None if every is None else every * rule.interval_steps)

    def keeps_always(self, step: int) -> bool:
        """Whether the rule never deletes the checkpoint of a step."""
        return self.keep_every is not None and step % self.keep_every == 0

    def claim_generation(self) -> int:
        """Take over the right to publish and clean up after killed launches; the number of this launch, from 1.

        Raises:
            CheckpointError: The folder belongs to another user, or any user can write to it; or it cannot be read.
            StorageError: The folder cannot be written.
        """
        with storage_errors(self.folder):
            if not self.folder.is_dir():
                self.folder.mkdir(mode=0o775, parents=True)
            self.refuse_untrusted()
            self._remove_leftovers()
        with reading(self.folder):
            newest = next((found for path in published(self.folder) if (found := read_manifest(path))), {})
        self._generation = max(_number_of(self._claimed()), int(newest.get("generation", 0))) + 1
        # The random part distinguishes two launches that have claimed at once where locks do not work.
        self._claim = f"{self._generation} {secrets.token_hex(8)}"
        write_exact(self.folder / GENERATION, f"{self._claim}\n")
        return self._generation

    def newest_intact(self) -> Checkpoint | None:
        """Find the newest checkpoint that verifies, and log those skipped; None if this run has never saved one.

        Raises:
            CheckpointError: Checkpoints exist, or have existed, and none can be used; or the newest is of an earlier
                format.
        """
        with reading(self.folder):
            found = list(published(self.folder))
            if found:
                self.refuse_untrusted()
                if (fault := pointer_fault(self.folder)) is not None:
                    logger.warning("%s %s; the newest intact checkpoint is used", self.folder / POINTER, fault)
            bad: list[str] = []
            for path in found:
                examined = examine(path)
                if isinstance(examined, Checkpoint):
                    return examined
                if examined == EARLIER:
                    raise earlier_format(path)
                bad.append(f"{path.name}: {examined}")
                logger.warning("checkpoint %s is skipped: %s", path, examined)
            self._refuse_silent_start(bad)
        return None

    def newest(self) -> Path | None:
        """The newest published checkpoint, intact or not, or None. Raises a CheckpointError if that cannot be read."""
        with reading(self.folder):
            return next(published(self.folder), None)

    def _refuse_silent_start(self, bad: Sequence[str]) -> None:
        """Refuse to begin at step 0 where checkpoints are damaged or missing."""
        trace = self._trace_of_saves()
        if bad or trace is not None:
            missing = f"{self.folder} holds no checkpoint, but {trace}"
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be used: {'; '.join(bad)}" if bad else missing,
                allowed="unchanged files that no other user can have written",
                action="restore intact copies (copy them as yourself if you trust them) and check with `inheritune-ds "
                f"checkpoints {self.folder.parent} verify`; {_START_OVER}",
            )

    def _trace_of_saves(self) -> str | None:
        """Evidence of an earlier save; None if there is none."""
        if os.path.lexists(self.folder / POINTER):
            return f"{POINTER} is there, so this run has saved before"
        status = read_json(self.folder.parent / "status.json")
        step = max(status.get("saved_step", 0), status.get("step", 0)) if isinstance(status, dict) else 0
        if step:
            return f"status.json says that step {step} was saved"
        ended = (self.folder.parent / "export").exists()
        return "export is there, so this run has finished before" if ended else None

    def refuse_untrusted(self) -> None:
        """Raise a CheckpointError if the folder belongs to another user, or any user can write to it."""
        if self.folder.exists() and (reason := distrust(self.folder.stat())) is not None:
            raise CheckpointError(
                f"{self.folder} {reason}; a checkpoint is loaded only if no other user can have written it",
                allowed="a folder of your own that others cannot write to",
                action=f"copy it as yourself if you trust its files, or `chmod o-w {self.folder}` if it is yours",
            )

    def begin(self, step: int) -> Path:
        """Make the empty folder of a new checkpoint for all ranks.

        Raises:
            CheckpointError: Another launch has taken over.
            StorageError: The disk refuses.
        """
        if not self._claim:
            self.claim_generation()
        self._refuse_if_superseded()
        temporary = self.folder / f".step-{step:08d}.tmp"
        with storage_errors(self.folder):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        return temporary

    def publish(
        self, temporary: Path, step: int, fields: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]
    ) -> Path:
        """Flush a written checkpoint to the disk and rename it to its name; then move the pointer.

        A kill at any moment leaves either this checkpoint or the one before. A pointer that cannot be moved is logged.
        `temporary` is from `begin`, `fields` are further ones of the manifest, and `files` has every file by its
        path inside the folder: {"bytes": size, "blake3": hex}.

        Raises:
            CheckpointError: Another launch has taken over, or the folder differs from `files`.
            StorageError: The disk refuses.
        """
        final = self.folder / f"step-{step:08d}"
        with storage_errors(self.folder):
            close_to_others(temporary)  # whatever the umask, since loading refuses an open folder
            if (fault := listing_fault(temporary, files)) is not None:
                raise CheckpointError(
                    f"the checkpoint of step {step} differs from the reports of its ranks: {fault}",
                    action=f"check the disk, and whether another process writes to {self.folder}",
                )
            manifest = {
                "format": FORMAT,
                "step": step,
                "generation": self._generation,
                "for_good": self.keeps_always(step),
                **fields,
                "files": dict(files),
            }
            sync_folder(temporary)
            write_exact(temporary / MANIFEST, manifest_text(manifest))
            close_to_others(temporary)
            sync_path(temporary)
            self._refuse_if_superseded()
            self._rename(temporary, final)
        try:
            self.point_at(final)
        except StorageError as error:
            logger.warning("step %d is saved, but %s does not name it: %s", step, POINTER, error.problem)
        return final

    def point_at(self, checkpoint: Path) -> None:
        """Write a checkpoint's name to the pointer."""
        pointer = self.folder / POINTER
        with storage_errors(self.folder):
            if pointer.is_symlink() or not pointer.is_dir():  # a folder of that name is kept
                write_exact(pointer, f"{checkpoint.name}\n")

    def _rename(self, temporary: Path, final: Path) -> None:
        replaced = self.folder / f".{final.name}{_REPLACED}"
        again = os.path.lexists(final)  # this step was saved before
        if again:
            remove_path(replaced)
            final.rename(replaced)  # a kill here: the next launch renames it back
        try:
            temporary.rename(final)
        except OSError:
            if again:
                replaced.rename(final)
            raise
        sync_path(self.folder)
        if again:
            remove_path(replaced)

    def _refuse_if_superseded(self) -> None:
        found = self._claimed()
        if _number_of(found) == 0:  # removed or damaged: no launch has claimed since
            write_exact(self.folder / GENERATION, f"{self._claim}\n")
        elif found != self._claim:
            raise CheckpointError(
                f"another launch (number {_number_of(found)}, this is {self._generation}) has taken over {self.folder}",
                allowed="one launch at a time to save here",
                action="leave the run to that launch; this one ends without saving",
            )

    def _claimed(self) -> str:
        try:
            return (self.folder / GENERATION).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return ""

    def _remove_leftovers(self) -> None:
        """Finish or remove the unfinished work of a killed launch."""
        for path in self.folder.glob(f".step-*{_REPLACED}"):
            final = self.folder / path.name.removeprefix(".").removesuffix(_REPLACED)
            if not final.exists():  # killed between the two renames of `_rename`
                path.rename(final)
        for path in self.folder.glob(".*.tmp"):
            remove_path(path)


def _number_of(claim: str) -> int:
    number = claim.partition(" ")[0]
    return int(number) if number.isdecimal() else 0


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turn an operating system's refusal to read checkpoints into a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"the checkpoints in {folder} cannot be read: {error.strerror}: {error.filename}",
            action="make the folder readable (is its disk mounted?), then rerun the same command to resume",
        ) from None


def require_space(folder: Path, checkpoint_bytes: int, *, count: int) -> None:
    """Raise a StorageError if a disk lacks space for `count` checkpoints of so many bytes, all ranks together.

    `folder`, where they go, need not exist.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free_bytes, needed_bytes = shutil.disk_usage(there).free, int(count * checkpoint_bytes)
    if free_bytes < needed_bytes:
        several = f"{count} checkpoints of {checkpoint_bytes:,} bytes take" if count > 1 else "a checkpoint takes"
        raise StorageError(
            f"{folder} has {free_bytes:,} bytes free, and {several} {needed_bytes:,}",
            action="free some space, or keep fewer checkpoints (checkpoint.keep)",
        )


def remove_path(path: Path, *, ignore_errors: bool = True) -> None:
    """Remove a folder with everything below it, or a file or link if one is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=ignore_errors)
    else:
        path.unlink(missing_ok=True)
