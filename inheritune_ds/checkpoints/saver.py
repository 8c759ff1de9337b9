"""Saving and loading with all ranks: each writes its own file, rank 0 publishes.

A save has three parts. Every rank takes its share of the state, then writes it to a file of its own. Rank 0 publishes
after every rank has reported that its file is on the disk. The ranks communicate in a process group of their own, so a
thread may write and publish while training continues.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

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
logger = logging.getLogger(__name__)


class Stateful(Protocol):
    """The part of the engine that saving and loading use."""

    def capture(self, buffers: PinnedBuffers | None) -> Snapshot:
        """Take this rank's share, or a copy of it."""

    def load(self, checkpoint: Checkpoint) -> Sequence[str]:
        """Restore this rank's share; return log lines."""


@dataclass(frozen=True)
class _Report:
    """One rank's part: the bytes to write, the file written with Adam's steps by parameter, or an error."""

    bytes: int = 0
    file: Mapping[str, Any] | None = None
    steps: Mapping[str, int] | None = None
    error: InherituneError | None = None


class Saver:
    """Saves and loads the checkpoints of one run; all ranks make one and call its methods together.

    `store` is used on rank 0 only. `fingerprints` of recipe, data and code versions go into the manifests. `group`
    replaces a process group of its own.
    """

    def __init__(  # noqa: PLR0913 - each is a part of its own
        self,
        store: CheckpointStore,
        *,
        layout: SavedLayout,
        world: World,
        reliability: Reliability,
        fingerprints: Mapping[str, Any],
        group: ObjectGroup | None = None,
    ) -> None:
        self._store, self._layout, self._world = store, layout, world
        self._stops, self._fingerprints = reliability.on_save_error == "stop", dict(fingerprints)
        self._buffers = PinnedBuffers() if reliability.async_save else None
        self._group = group or ObjectGroup(world, reliability.group_timeout_s)
        self._temporary: Path | None = None
        self._writing: Future[Path | InherituneError] | None = None
        self._pruning: Future[list[Path]] | None = None
        self.published_step: int | None = None
        """Step of the newest checkpoint that this launch has published; an asynchronous `save` returns before."""
        self.refusal = ""
        """The disk's last refusal of a save that the run continued without."""
        self.last_save_s = 0.0
        """Seconds of the last save, until it was published."""

    def save(self, engine: Stateful, state: TrainState) -> bool:
        """Save a checkpoint, after the save under way; an asynchronous save returns as soon as the state is copied.

        False if the disk refuses and the run may continue without it; True if it is published or under way.

        Raises:
            StorageError: On all ranks, if the disk refuses this save, or the one before, and the config says stop.
            CheckpointError: On all ranks, if another launch has taken the run over.
            TrainingError: If a rank has gone, or could not save for another reason.
        """
        self.wait()
        start_s = time.perf_counter()
        snapshot = engine.capture(self._buffers)
        if self._buffers is None:
            return self._accept(self._finish(state, snapshot, start_s))
        self._writing = _in_background(lambda: self._finish(state, snapshot, start_s), f"save-{state.step}")
        return True

    def _finish(self, state: TrainState, snapshot: Snapshot, start_s: float) -> Path | InherituneError:
        """Write and publish a snapshot with all ranks; the published folder or the error, the same on all ranks."""
        try:
            outcome = self._write_and_publish(state, snapshot)
        except RuntimeError as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            outcome = TrainingError(
                f"the ranks have lost each other while they saved step {state.step}: {reason}",
                action="find out how the missing rank has ended, then rerun the same command to resume from the newest "
                "published checkpoint",
            )
        temporary, self._temporary = self._temporary, None
        if isinstance(outcome, InherituneError):
            if isinstance(outcome, StorageError) and not self._stops:
                self.refusal = outcome.problem
                text = "step %d is NOT saved, training continues and older checkpoints are kept: %s"
                logger.warning(text, state.step, outcome.problem)
            # Not after a CheckpointError: another launch may write there by now.
            if temporary is not None and not isinstance(outcome, CheckpointError):
                shutil.rmtree(temporary, ignore_errors=True)
            return outcome
        self.last_save_s, self.published_step = time.perf_counter() - start_s, state.step
        if self._world.is_main:
            self._pruning = _in_background(lambda: retention.prune(self._store), f"prune-{state.step}")
        return outcome

    def _write_and_publish(self, state: TrainState, snapshot: Snapshot) -> Path | InherituneError:
        """Make room, write this rank's file, exchange reports, publish on rank 0."""
        failure = None
        if snapshot.failure is not None:
            failure = TrainingError(
                f"rank {self._world.rank} could not copy its state to host memory: {snapshot.failure}",
                action='set "async_save": false in the reliability block of the DeepSpeed config',
            )
        reports = self._group.gather(_Report(snapshot.bytes, error=failure))
        total_bytes = sum(report.bytes for report in reports)
        temporary = self._run_on_rank0(reports, lambda: self._make_folder(state.step, total_bytes))
        if isinstance(temporary, InherituneError):
            return temporary
        written = self._group.gather(self._write(snapshot, temporary, total_bytes))
        return self._run_on_rank0(written, lambda: self._publish(state, snapshot, temporary, total_bytes, written))

    def _run_on_rank0(self, reports: Sequence[_Report], work: Callable[[], Path]) -> Path | InherituneError:
        """Run work on rank 0 while the other ranks wait; an error of a report or of the work is returned on all."""
        outcome: Path | InherituneError | None = next((report.error for report in reports if report.error), None)
        if self._world.is_main and outcome is None:
            outcome = self._attempt(work)
        answer = self._group.broadcast(outcome)
        assert answer is not None  # rank 0 has a path or an error
        return answer

    def _make_folder(self, step: int, total_bytes: int) -> Path:
        require_space(self._store.folder, total_bytes, count=1)
        with _naming_bytes(total_bytes):
            self._temporary = self._store.begin(step)
        return self._temporary

    def _write(self, snapshot: Snapshot, temporary: Path, total_bytes: int) -> _Report:
        """Write this rank's file."""
        path = temporary / file_name(self._world.rank)
        file = self._attempt(lambda: write(snapshot.fragments, path, needed_bytes=total_bytes))
        if isinstance(file, InherituneError):
            return _Report(error=file)
        steps = {name: parameter["step"] for name, parameter in snapshot.parameters.items()}
        return _Report(file=file, steps={name: step for name, step in steps.items() if step is not None})

    def _publish(
        self, state: TrainState, snapshot: Snapshot, temporary: Path, total_bytes: int, reports: Sequence[_Report]
    ) -> Path:
        """Check that the files of all ranks hold every element exactly once, and publish them."""
        steps = {name: step for report in reports for name, step in (report.steps or {}).items()}
        parameters = {name: {**parameter, "step": steps.get(name)} for name, parameter in snapshot.parameters.items()}
        check_coverage(temporary, self._world.size, parameters)
        fields = {
            "state": state.as_dict(),
            "layout": asdict(self._layout),
            "fingerprints": self._fingerprints,
            "engine": snapshot.engine,
            "parameters": parameters,
        }
        files = {file_name(rank): report.file or {} for rank, report in enumerate(reports)}
        with _naming_bytes(total_bytes):
            return self._store.publish(temporary, state.step, fields, files)

    def _attempt(self, work: Callable[[], Value]) -> Value | InherituneError:
        """Return an error instead of raising it, since the other ranks wait for this rank's report."""
        try:
            with storage_errors(self._store.folder):
                return work()
        except InherituneError as error:
            return error
        except Exception as error:  # noqa: BLE001 - reported to all ranks
            return TrainingError(
                f"rank {self._world.rank} could not save: {type(error).__name__}: {error}",
                action="older checkpoints are kept; this is a defect, please report it",
            )

    def _accept(self, outcome: Path | InherituneError) -> bool:
        """True for a published checkpoint; False for a refusal of the disk that does not end the run."""
        if isinstance(outcome, Path):
            return True
        if self._stops or not isinstance(outcome, StorageError):
            raise outcome
        return False

    @property
    def wants_save(self) -> bool:
        """Whether a failed async save forces a save, so that all ranks raise together."""
        if self._writing is None or not self._writing.done():
            return False
        ended = self._writing.exception() or self._writing.result()
        return isinstance(ended, BaseException) and (self._stops or not isinstance(ended, StorageError))

    def wait(self) -> bool:
        """Wait for the save under way; False if the disk refused it and the run may continue. Errors as in `save`."""
        writing, self._writing = self._writing, None
        outcome = writing.result() if writing is not None else None
        pruning, self._pruning = self._pruning, None
        if pruning is not None:
            pruning.result()
        return outcome is None or self._accept(outcome)

    def close(self) -> None:
        """Wait for the save under way, then leave the process group; errors as in `save`."""
        try:
            self.wait()
        finally:
            self._group.close()

    def load(self, engine: Stateful, checkpoint: Checkpoint) -> TrainState:
        """Restore a checkpoint that rank 0 has verified; raise a CheckpointError on all ranks if one sees another."""
        path = checkpoint.path / MANIFEST
        seen = self._group.gather(sha256_file(path) if path.is_file() else None)
        others = [str(rank) for rank, digest in enumerate(seen) if digest != seen[0] or digest is None]
        if others:
            raise CheckpointError(
                f"rank {', '.join(others)} does not see the {path} that rank 0 sees",
                allowed="one run folder that all machines share",
                action="put --runs-dir on a file system that every node mounts",
            )
        for note in engine.load(checkpoint):
            logger.info(note)
        return checkpoint.state


def _in_background(call: Callable[[], Value], name: str) -> "Future[Value]":
    """Start a call in a daemon thread, which does not keep an ending process alive."""
    future: Future[Value] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised by `result`
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


@contextmanager
def _naming_bytes(total_bytes: int) -> Iterator[None]:
    """Add the bytes of the checkpoint to a refusal of the disk."""
    try:
        yield
    except StorageError as error:
        raise StorageError(
            f"{error.problem}; the checkpoint takes {total_bytes:,} bytes", allowed=error.allowed, action=error.action
        ) from None
