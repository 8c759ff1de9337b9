"""A run's checkpoints on the disk: published by one rename, verified before use, deleted by a rule.

checkpoints/  step-00000100/  step-00000200/   each with manifest.json: sizes and hashes of all its files
              latest                           name of the newest one; for people and tools, never needed
              generation                       which launch may publish here
              .step-00000300.tmp/              being written; a killed launch's is removed by the next one
"""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inheritune_ds.checkpoints.manifest import (
    MANIFEST,
    POINTER,
    close_to_others,
    distrust,
    find_fault,
    listing_fault,
    manifest_text,
    newest_step,
    pointer_fault,
    published,
    read_manifest,
    step_of,
)
from inheritune_ds.errors import CheckpointError, StorageError
from inheritune_ds.storage.files import read_json, storage_errors, sync_folder, sync_path, write_exact

if TYPE_CHECKING:
    from inheritune_ds.config.training import Checkpointing

__all__ = ["MANIFEST", "POINTER", "find_fault", "newest_step", "published", "read_manifest", "step_of"]

GENERATION = "generation"
_REPLACED = ".replaced.tmp"
_PICKLE = "DeepSpeed's files are pickle, which can run code when it is loaded"


class CheckpointStore:
    """The folder of a run's checkpoints; one process, rank 0 of the launch that has the run folder, changes it.

    Args:
        folder: `checkpoints/` of the run folder.
        keep: How many of the newest stay.
        keep_every: Checkpoints whose step is a multiple of this many steps stay for good; None: only the newest.
    """

    def __init__(self, folder: Path, *, keep: int, keep_every: int | None = None) -> None:
        self.folder, self._keep, self._keep_every = folder, keep, keep_every
        self._generation = 0
        self._claim = ""

    @classmethod
    def of(cls, folder: Path, rule: "Checkpointing") -> "CheckpointStore":
        """The store of a recipe: its `keep_every` counts checkpoints, so it stands for that many intervals of steps."""
        every = rule.keep_every
        return cls(folder, keep=rule.keep, keep_every=None if every is None else every * rule.interval_steps)

    def claim_generation(self) -> int:
        """Take the right to publish from every earlier launch, and remove what killed ones have left.

        Returns:
            The number of this launch, from 1.

        Raises:
            CheckpointError: The folder belongs to somebody else, or everybody can write to it; or it cannot be read.
            StorageError: The folder cannot be written.
        """
        with storage_errors(self.folder):
            if not self.folder.is_dir():
                self.folder.mkdir(mode=0o775, parents=True)
            self.refuse_untrusted()
            self._remove_leftovers()
        with self._reading():
            newest = next((found for path in published(self.folder) if (found := read_manifest(path))), {})
        self._generation = max(_number_of(self._claimed()), int(newest.get("generation", 0))) + 1
        # The random part tells apart two launches that have claimed at once where locks do not work.
        self._claim = f"{self._generation} {secrets.token_hex(8)}"
        write_exact(self.folder / GENERATION, f"{self._claim}\n")
        return self._generation

    def newest_verified(self, say: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that is intact; None if this run has never saved one.

        Args:
            say: Told every damaged one that is passed over, and what is wrong with the pointer.

        Raises:
            CheckpointError: Checkpoints exist, or have existed, and none can be used.
        """
        with self._reading():
            return self._newest_verified(say)

    def newest(self) -> Path | None:
        """The newest published checkpoint, intact or not; None if there is none.

        Raises:
            CheckpointError: The folder cannot be read.
        """
        with self._reading():
            return next(published(self.folder), None)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"the checkpoints in {self.folder} cannot be read: {error.strerror}: {error.filename}",
                action="make the folder readable (is its disk there?), then give the same command again",
            ) from None

    def _newest_verified(self, say: Callable[[str], None]) -> Path | None:
        found = list(published(self.folder))
        if found:
            self.refuse_untrusted()
            if (fault := pointer_fault(self.folder)) is not None:
                say(f"WARNING: {self.folder / POINTER} {fault}; the newest intact checkpoint is used without it")
        bad: list[str] = []
        for checkpoint in found:
            if (fault := find_fault(checkpoint)) is None:
                return checkpoint
            bad.append(f"{checkpoint.name}: {fault}")
            say(f"WARNING: checkpoint {checkpoint} is passed over: {fault}")
        if bad:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be used: {'; '.join(bad)}",
                allowed=f"files as they were written, and your own: {_PICKLE}",
                action=self._advice("bring intact copies back"),
            )
        if (trace := self._trace_of_saves()) is not None:
            raise CheckpointError(
                f"{self.folder} holds no checkpoint any more, but {trace}",
                action=self._advice("bring the checkpoints back"),
            )
        return None

    def _advice(self, first: str) -> str:
        return (
            f"{first} (copy them as yourself if you trust them) and look with `inheritune-ds checkpoints "
            f"{self.folder.parent} verify`; or start over with --fresh, which sets the old run aside"
        )

    def _trace_of_saves(self) -> str | None:
        """What tells that checkpoints were here once; None if nothing does."""
        if os.path.lexists(self.folder / POINTER):
            return f"{POINTER} is there, so this run has saved before"
        status = read_json(self.folder.parent / "status.json")
        step = max(status.get("saved_step", 0), status.get("step", 0)) if isinstance(status, dict) else 0
        if step:
            return f"status.json tells that step {step} was saved"
        ended = (self.folder.parent / "export").exists()
        return "export is there, so this run has come to its end before" if ended else None

    def refuse_untrusted(self) -> None:
        """Refuse a folder in which somebody else may have put what lies there.

        Raises:
            CheckpointError: It belongs to somebody else, or everybody can write to it.
        """
        if self.folder.exists() and (reason := distrust(self.folder.stat())) is not None:
            raise CheckpointError(
                f"{self.folder} {reason}; {_PICKLE}",
                allowed="a folder of your own that others cannot write to",
                action=f"copy it as yourself if you trust what lies there, or `chmod o-w {self.folder}` if it is yours",
            )

    def temporary(self, step: int) -> Path:
        """Where the checkpoint of a step is written before it is published."""
        return self.folder / f".step-{step:08d}.tmp"

    def begin(self, step: int) -> Path:
        """Make the empty folder that all ranks write a checkpoint into.

        Raises:
            CheckpointError: Another launch has taken over.
            StorageError: The disk refuses.
        """
        if not self._claim:
            self.claim_generation()
        self._refuse_if_superseded()
        temporary = self.temporary(step)
        with storage_errors(self.folder):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        return temporary

    def discard(self, temporary: Path) -> None:
        """Remove a checkpoint that will not be published."""
        shutil.rmtree(temporary, ignore_errors=True)

    def publish(
        self,
        temporary: Path,
        step: int,
        fields: Mapping[str, Any],
        files: Mapping[str, Mapping[str, Any]],
        say: Callable[[str], None],
    ) -> Path:
        """Bring a written checkpoint to the disk and let it appear, whole, under its name; the pointer follows.

        A kill at any moment leaves either this checkpoint or what was there before.

        Args:
            temporary: From `begin`, filled by all ranks.
            step: Whose it is.
            fields: What else the manifest tells; JSON.
            files: {path inside the folder: {"bytes": size, "blake3": hex}} of everything that was written.
            say: Told if the pointer cannot follow: the checkpoint is there all the same, and is used.

        Raises:
            CheckpointError: Another launch has taken over, or what lies there is not what `files` tells.
            StorageError: The disk refuses.
        """
        final = self.folder / f"step-{step:08d}"
        with storage_errors(self.folder):
            close_to_others(temporary)  # whatever the umask: it would be refused when it is loaded
            if (fault := listing_fault(temporary, files)) is not None:
                raise CheckpointError(
                    f"the checkpoint of step {step} was not written as its ranks have told: {fault}",
                    action=f"look for another process that writes to {self.folder}, and at the disk",
                )
            told = {"step": step, "generation": self._generation, "for_good": self._stays_for_good(step)}
            manifest = {**told, **fields, "files": dict(files)}
            sync_folder(temporary)
            write_exact(temporary / MANIFEST, manifest_text(manifest))
            close_to_others(temporary)
            sync_path(temporary)
            self._refuse_if_superseded()
            self._let_appear(temporary, final)
        try:
            self._point_at(final)
        except StorageError as error:
            say(f"WARNING: step {step} is saved, but {POINTER} does not name it: {error.problem}")
        return final

    def _point_at(self, checkpoint: Path) -> None:
        pointer = self.folder / POINTER
        with storage_errors(self.folder):
            if pointer.is_symlink() or not pointer.is_dir():  # a folder of that name is somebody's; nothing needs it
                write_exact(pointer, f"{checkpoint.name}\n")

    def _let_appear(self, temporary: Path, final: Path) -> None:
        replaced = self.folder / f".{final.name}{_REPLACED}"
        again = os.path.lexists(final)  # this step was saved before
        if again:
            _remove(replaced)
            final.rename(replaced)  # a kill here: the next launch renames it back
        try:
            temporary.rename(final)
        except OSError:
            if again:
                replaced.rename(final)
            raise
        sync_path(self.folder)
        if again:
            _remove(replaced)

    def _refuse_if_superseded(self) -> None:
        found = self._claimed()
        if _number_of(found) == 0:  # removed or damaged: nobody has claimed after us
            write_exact(self.folder / GENERATION, f"{self._claim}\n")
        elif found != self._claim:
            raise CheckpointError(
                f"another launch (number {_number_of(found)}, this is {self._generation}) has taken over {self.folder}",
                allowed="one launch at a time to save here",
                action="let that one go on; this one ends without saving",
            )

    def _claimed(self) -> str:
        try:
            return (self.folder / GENERATION).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return ""

    def _remove_leftovers(self) -> None:
        """Remove what a killed launch has left half done; nobody else saves here now."""
        for path in self.folder.glob(f".step-*{_REPLACED}"):
            final = self.folder / path.name.removeprefix(".").removesuffix(_REPLACED)
            if not final.exists():  # killed between the two renames of `_let_appear`
                path.rename(final)
        for path in self.folder.glob(".*.tmp"):
            _remove(path)

    def staying(self) -> dict[Path, str]:
        """The published checkpoints that stay, the newest first, and why; no change of the rule takes one for good."""
        reasons: dict[Path, str] = {}
        for number, checkpoint in enumerate(published(self.folder), 1):
            if number <= self._keep:
                reasons[checkpoint] = f"newest {self._keep}"
            elif self._stays_for_good(step_of(checkpoint)):
                reasons[checkpoint] = f"every {self._keep_every} steps"
            elif (read_manifest(checkpoint) or {}).get("for_good"):
                reasons[checkpoint] = "for good, by the rule of then"
        return reasons

    def _stays_for_good(self, step: int) -> bool:
        return self._keep_every is not None and step % self._keep_every == 0

    def leaving(self) -> list[Path]:
        """What the rule does not keep, the newest first, once the newest of all has been read back and is intact.

        Raises:
            CheckpointError: It is damaged, so that nothing may be deleted; or the folder cannot be read.
        """
        with self._reading():
            found, staying = list(published(self.folder)), self.staying()  # one that appears meanwhile is not `found`
        leaving = [checkpoint for checkpoint in found if checkpoint not in staying]
        if leaving and (fault := find_fault(found[0])) is not None:
            action = "bring an intact copy of it back, or remove it: until then nothing is deleted"
            raise CheckpointError(f"checkpoint {found[0]} is damaged: {fault}", action=action)
        return leaving

    def prune(self, say: Callable[[str], None]) -> list[Path]:
        """Delete what is `leaving`, while a run trains: a damaged checkpoint does not end it.

        Args:
            say: Told why nothing is deleted, or what cannot be.

        Returns:
            What was deleted.
        """
        try:
            return [checkpoint for checkpoint in self.leaving() if self.remove(checkpoint, say)]
        except CheckpointError as error:
            say(f"WARNING: {error.problem}; the older ones stay, however many there are")
            return []

    def go_back(self, step: int, say: Callable[[str], None]) -> list[Path]:
        """Delete the checkpoints later than a step, so that the run goes on from the newest of the others.

        Args:
            step: The latest that may stay.
            say: Told what cannot be deleted.

        Returns:
            What was deleted.

        Raises:
            CheckpointError: Nothing intact would be left.
            StorageError: The pointer cannot be written.
        """
        later = self.gone_back(step)
        self._point_at(next(checkpoint for checkpoint in published(self.folder) if checkpoint not in later))
        return [checkpoint for checkpoint in later if self.remove(checkpoint, say)]

    def gone_back(self, step: int) -> list[Path]:
        """What `go_back` would delete.

        Raises:
            CheckpointError: Nothing intact would be left.
        """
        later = [checkpoint for checkpoint in published(self.folder) if step_of(checkpoint) > step]
        newest = next((checkpoint for checkpoint in published(self.folder) if checkpoint not in later), None)
        fault = "no checkpoint is as early" if newest is None else find_fault(newest)
        if newest is None or fault is not None:
            raise CheckpointError(
                f"the run cannot go back to step {step}: {f'{newest.name}: ' if newest else ''}{fault}",
                allowed="a step at or after that of an intact checkpoint",
                action=f"`inheritune-ds checkpoints {self.folder.parent} verify` tells which are intact",
            )
        return later

    def remove(self, checkpoint: Path, say: Callable[[str], None]) -> bool:
        """Delete a checkpoint that `leaving` or `gone_back` has told; False if it cannot be, which is said."""
        hidden = self.folder / f".{checkpoint.name}.deleted.tmp"
        try:
            _remove(hidden)
            checkpoint.rename(hidden)  # never half deleted under its own name
            _remove(hidden, ignore_errors=False)
        except OSError as error:  # such as a shared file system on which somebody still reads it
            say(f"checkpoint {checkpoint} cannot be deleted: {error.strerror}: {error.filename}; training goes on")
            return False
        return True


def _number_of(claim: str) -> int:
    number = claim.partition(" ")[0]
    return int(number) if number.isdecimal() else 0


def _remove(path: Path, *, ignore_errors: bool = True) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=ignore_errors)
    else:
        path.unlink(missing_ok=True)
