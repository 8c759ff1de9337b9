"""Saving and loading with all ranks: each writes its own file, all agree, one publishes.

A save has three parts. Every rank takes its share of the state, then writes it to a file of its own. Rank 0 publishes
after every rank has reported that its file is on the disk. The ranks communicate in a group of their own, so a thread
may write and publish while training continues.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from inheritune_ds.checkpoints import retention
from inheritune_ds.checkpoints.fragments import check_coverage, file_name, write
from inheritune_ds.checkpoints.manifest import MANIFEST, Checkpoint
from inheritune_ds.checkpoints.snapshot import PinnedBuffers, Snapshot
from inheritune_ds.checkpoints.store import CheckpointStore, require_space
from inheritune_ds.checkpoints.train_state import SavedLayout, TrainState
from inheritune_ds.config.reliability import Reliability
from inheritune_ds.distributed.coordination import ObjectGroup
from inheritune_ds.distributed.world import World
from inheritune_ds.errors import CheckpointError, InherituneError, StorageError, TrainingError
from inheritune_ds.storage.files import sha256_file, storage_errors

Value = TypeVar("Value")


class Stateful(Protocol):
    """The engine, as far as it is saved."""

    def capture(self, buffers: PinnedBuffers | None) -> Snapshot:
        """Take this rank's share, or a copy of it."""

    def load(self, checkpoint: Checkpoint) -> Sequence[str]:
        """Restore this rank's share; returns lines for the user."""


@dataclass(frozen=True)
class _Report:
    """One rank's part: the bytes to write, the file written with Adam's steps by parameter, or an error."""

    bytes: int = 0
    file: Mapping[str, Any] | None = None
    steps: Mapping[str, int] | None = None
    error: InherituneError | None = None


class Saver:
    """Saves and loads the checkpoints of one run, on one rank; all ranks make one and call its methods together.

    Args:
        store: Where they are published; used on rank 0 alone.
        layout: Of this launch.
        world: This rank among all.
        reliability: Whether training waits for the disk, and what happens when the disk refuses.
        fingerprints: Of recipe, data and code versions, for the manifest.
        say: Prints one line for the user, on rank 0; also called from a thread.
        group: Instead of a process group of its own.
    """

    def __init__(  # noqa: PLR0913 - each is a part of its own
        self,
        store: CheckpointStore,
        *,
        layout: SavedLayout,
        world: World,
        reliability: Reliability,
        fingerprints: Mapping[str, Any],
        say: Callable[[str], None],
        group: ObjectGroup | None = None,
    ) -> None:
        self._store, self._layout, self._world, self._say = store, layout, world, say
        self._stops, self._fingerprints = reliability.on_save_error == "stop", dict(fingerprints)
        self._buffers = PinnedBuffers() if reliability.async_save else None
        self._group = group or ObjectGroup(world, reliability.watchdog_s["save"])
        self._temporary: Path | None = None
        self._writing: _Background[Path | InherituneError] | None = None
        self._pruning: _Background[list[Path]] | None = None
        self.published_step: int | None = None
        """Step of the newest checkpoint that this launch has published; an asynchronous `save` returns before."""
        self.refusal = ""
        """Why the disk has refused the last save that it refused."""
        self.last_save_s = 0.0
        """Seconds of the last save, from its beginning to its publishing."""

    def save(self, engine: Stateful, state: TrainState) -> bool:
        """Save a checkpoint; an asynchronous save returns as soon as the state is copied, before the ranks communicate.

        A save that is still under way is waited for first.

        Returns:
            Whether it is published, or under way; False if the disk refuses and the run may continue without it.

        Raises:
            StorageError: On all ranks, if the disk refuses this save, or the one before, and the config says stop.
            CheckpointError: On all ranks, if another launch has taken the run over.
            TrainingError: If a rank has gone, or could not save for another reason.
        """
        self.wait()
        start_s = time.perf_counter()
        work = _Work(state, engine.capture(self._buffers), start_s)
        if self._buffers is None:
            return self._accept(self._finish(work))
        self._writing = _Background(lambda: self._finish(work), f"save-{state.step}")
        return True

    def _finish(self, work: "_Work") -> Path | InherituneError:
        """Write and publish a snapshot with all ranks; the published folder or the error, the same on all ranks."""
        outcome = self._together(work.state.step, lambda: self._write_and_publish(work))
        if isinstance(outcome, InherituneError):
            self._warn(work.state.step, outcome)
            self._drop(outcome)
            return outcome
        self._temporary = None
        self.last_save_s, self.published_step = time.perf_counter() - work.start_s, work.state.step
        if self._world.is_main:
            self._pruning = _Background(lambda: retention.prune(self._store, self._say), f"prune-{work.state.step}")
        return outcome

    def _write_and_publish(self, work: "_Work") -> Path | InherituneError:
        """Make room, write this rank's file, exchange reports, let rank 0 publish."""
        begun = self._begin(work.state.step, work.snapshot)
        if isinstance(begun, InherituneError):
            return begun
        temporary, total_bytes = begun
        reports = self._group.gather(self._write(work.snapshot, temporary, total_bytes))
        outcome: Path | InherituneError | None = _first_error(reports)
        if self._world.is_main and outcome is None:
            outcome = self._attempt(lambda: self._publish(work, temporary, total_bytes, reports))
        answer = self._group.broadcast(outcome)
        assert answer is not None  # rank 0 has published, or reports why not
        return answer

    def _publish(self, work: "_Work", temporary: Path, total_bytes: int, reports: Sequence[_Report]) -> Path:
        """Check that the files of all ranks hold every element once, and publish them."""
        steps = {name: step for report in reports for name, step in (report.steps or {}).items()}
        parameters = {
            name: {**parameter, "step": steps.get(name)} for name, parameter in work.snapshot.parameters.items()
        }
        check_coverage(temporary, self._world.size, parameters)
        fields = {
            "state": work.state.as_dict(),
            "layout": asdict(self._layout),
            "fingerprints": self._fingerprints,
            "engine": work.snapshot.engine,
            "parameters": parameters,
        }
        files = {file_name(rank): report.file or {} for rank, report in enumerate(reports)}
        with _naming_bytes(total_bytes):
            return self._store.publish(temporary, work.state.step, fields, files, self._say)

    def _begin(self, step: int, snapshot: Snapshot) -> "tuple[Path, int] | InherituneError":
        """Make the folder to write to if there is room: its path, and the bytes of the whole checkpoint."""
        error = None
        if snapshot.failure is not None:
            error = TrainingError(
                f"rank {self._world.rank} could not copy its state to host memory: {snapshot.failure}",
                action='set "async_save": false in the reliability block of the DeepSpeed config',
            )
        reports = self._group.gather(_Report(snapshot.bytes, error=error))
        failed = _first_error(reports)
        total_bytes = sum(report.bytes for report in reports)
        made: Path | InherituneError | None = failed
        if self._world.is_main and failed is None:
            made = self._attempt(lambda: self._make_folder(step, total_bytes))
        answer = self._group.broadcast(made)
        assert answer is not None  # rank 0 has made a folder, or says why not
        return answer if isinstance(answer, InherituneError) else (answer, total_bytes)

    def _make_folder(self, step: int, total_bytes: int) -> Path:
        require_space(self._store.folder, total_bytes, count=1)
        with _naming_bytes(total_bytes):
            self._temporary = self._store.begin(step)
        return self._temporary

    def _drop(self, error: InherituneError) -> None:
        """Remove what will not be published; not where another launch may write by now."""
        temporary, self._temporary = self._temporary, None
        if temporary is not None and not isinstance(error, CheckpointError):
            self._store.discard(temporary)

    def _write(self, snapshot: Snapshot, temporary: Path, needed_bytes: int) -> _Report:
        """Write this rank's file."""
        try:
            file = write(snapshot.fragments, temporary / file_name(self._world.rank), needed_bytes=needed_bytes)
        except InherituneError as error:
            return _Report(error=error)
        except Exception as error:  # noqa: BLE001 - the others wait for this rank's report
            return _Report(error=_defect(self._world, error))
        steps = {name: parameter["step"] for name, parameter in snapshot.parameters.items()}
        return _Report(file=file, steps={name: step for name, step in steps.items() if step is not None})

    def _attempt(self, work: Callable[[], Path]) -> Path | InherituneError:
        """Work on rank 0 while the other ranks wait; an error is sent to them instead of raised."""
        try:
            with storage_errors(self._store.folder):
                return work()
        except InherituneError as error:
            return error
        except Exception as error:  # noqa: BLE001 - the others wait for rank 0's answer
            return _defect(self._world, error)

    def _together(self, step: int, work: Callable[[], Value]) -> Value | InherituneError:
        try:
            return work()
        except RuntimeError as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            return TrainingError(
                f"the ranks have lost each other while they saved step {step}: {reason}",
                action="see how the missing rank has ended, then give the same command again: it resumes from the "
                "newest published checkpoint",
            )

    def _accept(self, outcome: Path | InherituneError) -> bool:
        """True for a published checkpoint; False for a refusal of the disk that does not end the run."""
        if isinstance(outcome, Path):
            return True
        if self._stops or not isinstance(outcome, StorageError):
            raise outcome
        return False

    def _warn(self, step: int, error: InherituneError) -> None:
        if isinstance(error, StorageError) and not self._stops:
            self.refusal = error.problem
            self._say(
                f"WARNING: step {step} is NOT saved, the run goes on, and older checkpoints are kept: {error.problem}"
            )

    @property
    def wants_save(self) -> bool:
        """Whether a failed async save forces a save, so that all ranks raise together."""
        ended = self._writing.error or self._writing.result if self._writing is not None else None
        return isinstance(ended, BaseException) and (self._stops or not isinstance(ended, StorageError))

    def wait(self) -> bool:
        """Wait for the save under way.

        Returns:
            False if the disk has refused it and the run may continue without it.

        Raises:
            InherituneError: As `save` does.
        """
        writing, self._writing = self._writing, None
        outcome = writing.wait() if writing is not None else None
        pruning, self._pruning = self._pruning, None
        if pruning is not None:
            pruning.wait()
        return outcome is None or self._accept(outcome)

    def close(self) -> None:
        """Wait for the save under way; nothing is saved after that.

        Raises:
            InherituneError: As `save` does.
        """
        try:
            self.wait()
        finally:
            self._group.close()

    def load(self, engine: Stateful, checkpoint: Checkpoint) -> TrainState:
        """Restore a verified checkpoint.

        Args:
            engine: Of this rank.
            checkpoint: As rank 0 has read it.

        Raises:
            CheckpointError: On all ranks, if one of them does not see the files that rank 0 sees.
        """
        self._check_same(checkpoint.path)
        for note in engine.load(checkpoint):
            self._say(note)
        return checkpoint.state

    def _check_same(self, folder: Path) -> None:
        path = folder / MANIFEST
        seen = self._group.gather(sha256_file(path) if path.is_file() else None)
        others = [str(rank) for rank, digest in enumerate(seen) if digest != seen[0] or digest is None]
        if others:
            raise CheckpointError(
                f"rank {', '.join(others)} does not see the {path} that rank 0 sees",
                allowed="one run folder that all machines share",
                action="put --runs-dir on a file system that every node mounts",
            )


@dataclass(frozen=True)
class _Work:
    state: TrainState
    snapshot: Snapshot
    start_s: float


class _Background(Generic[Value]):
    """One call in a thread, which does not keep a process alive that ends for another reason."""

    def __init__(self, call: Callable[[], Value], name: str) -> None:
        self.result: Value | None = None
        self.error: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:  # noqa: BLE001 - raised by `wait`
            self.error = error

    def wait(self) -> Value | None:
        self._thread.join()
        if self.error is not None:
            raise self.error
        return self.result


def _first_error(reports: Sequence[_Report]) -> InherituneError | None:
    return next((report.error for report in reports if report.error is not None), None)


@contextmanager
def _naming_bytes(total_bytes: int) -> Iterator[None]:
    """Add the bytes of the checkpoint to a refusal of the disk."""
    try:
        yield
    except StorageError as error:
        raise StorageError(
            f"{error.problem}; the checkpoint takes {total_bytes:,} bytes", allowed=error.allowed, action=error.action
        ) from None


def _defect(world: World, error: Exception) -> TrainingError:
    return TrainingError(
        f"rank {world.rank} could not save: {type(error).__name__}: {error}",
        action="older checkpoints are kept; this is a defect, please report it",
    )
