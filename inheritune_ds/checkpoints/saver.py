"""Saving and loading with all ranks: each writes its own files, all agree, one publishes.

A save has three parts. Taking the state needs all ranks and the training's process group; it ends before anything is
written. Writing is each rank's own. Publishing is rank 0's, once every rank has said that its files are on the disk.
The ranks speak of the last two over a group of their own, so a thread may do both while the training goes on.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from inheritune_ds.checkpoints.manifest import MANIFEST, read_manifest
from inheritune_ds.checkpoints.shard_writer import require_space, write_shard
from inheritune_ds.checkpoints.snapshot import CapturedState, PinnedBuffers
from inheritune_ds.checkpoints.store import CheckpointStore
from inheritune_ds.checkpoints.train_state import SavedLayout, TrainState
from inheritune_ds.config.reliability import Reliability
from inheritune_ds.distributed.coordination import Circle, make_circle
from inheritune_ds.distributed.world import World
from inheritune_ds.errors import CheckpointError, InherituneError, StorageError, TrainingError
from inheritune_ds.storage.files import sha256_file, storage_errors

Value = TypeVar("Value")


class Stateful(Protocol):
    """What is saved: the engine."""

    def capture(self, copies: PinnedBuffers | None) -> CapturedState:
        """Take this rank's share, or a copy of it; all ranks together."""

    def load(self, folder: Path) -> Sequence[str]:
        """Restore this rank's share; returns lines for the user."""


@dataclass(frozen=True)
class _Report:
    """How one rank's part went: what it wrote, or why it could not."""

    bytes: int = 0
    files: Mapping[str, dict[str, Any]] | None = None
    error: InherituneError | None = None


class Saver:
    """The checkpoints of one run, on one rank; all ranks make one together and call its methods together.

    Args:
        store: Where they are published; rank 0 alone asks it for anything.
        layout: Of this launch.
        world: This rank among all.
        reliability: Whether training waits for the disk, and what happens when the disk refuses.
        fingerprints: Of recipe, data and code versions, for the manifest.
        say: Prints one line for the user, on rank 0; also called from a thread.
        circle: Instead of a process group of its own.
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
        circle: Circle | None = None,
    ) -> None:
        self._store, self._layout, self._world, self._say = store, layout, world, say
        self._stops, self._fingerprints = reliability.on_save_error == "stop", dict(fingerprints)
        self._copies = PinnedBuffers() if reliability.async_save else None
        self._circle = circle or make_circle(world, reliability.watchdog_s["save"])
        self._temporary: Path | None = None
        self._writing: _Background[Path | InherituneError] | None = None
        self._pruning: _Background[list[Path]] | None = None
        self.published_step: int | None = None
        """Of the newest checkpoint that this launch has published; in async mode `save` returns before."""
        self.refusal = ""
        """Why the disk has refused the last save that it refused."""
        self.last_save_s = 0.0
        """Seconds of the last save, from its beginning to its publishing."""

    def save(self, engine: Stateful, state: TrainState) -> bool:
        """Save a checkpoint; in async mode, come back as soon as the state is copied, before the ranks meet over it.

        A save that is still under way is waited for first.

        Returns:
            Whether it is published, or on its way; False if the disk refuses and the run may go on without it.

        Raises:
            StorageError: On all ranks, if the disk refuses this save, or the one before, and the config says stop.
            CheckpointError: On all ranks, if another launch has taken the run over.
            TrainingError: If a rank has gone, or could not save for another reason.
        """
        self.settle()
        start_s = time.perf_counter()
        work = _Work(state, engine.capture(self._copies), start_s)
        if self._copies is None:
            return self._accept(self._finish(work))
        self._writing = _Background(lambda: self._finish(work), f"save-{state.step}")
        return True

    def _finish(self, work: "_Work") -> Path | InherituneError:
        """Bring what was taken to the disk, all ranks together; what came of it, the same on all ranks."""
        outcome = self._together(work.state.step, lambda: self._write_and_publish(work))
        if isinstance(outcome, InherituneError):
            self._tell_user(work.state.step, outcome)
            self._drop(outcome)
            return outcome
        self._temporary = None
        self.last_save_s, self.published_step = time.perf_counter() - work.start_s, work.state.step
        if self._world.is_main:
            self._pruning = _Background(lambda: self._store.prune(self._say), f"prune-{work.state.step}")
        return outcome

    def _write_and_publish(self, work: "_Work") -> Path | InherituneError:
        """Make room, write this rank's files, meet the others, let rank 0 publish."""
        begun = self._begin(work.state.step, work.captured)
        if isinstance(begun, InherituneError):
            return begun
        temporary, total_bytes = begun
        reports = self._circle.gather(self._write(work.captured.shards, temporary, total_bytes))
        outcome: Path | InherituneError | None = _first_error(reports)
        if self._world.is_main and outcome is None:
            files = {name: entry for report in reports for name, entry in (report.files or {}).items()}
            fields = {
                "state": work.state.as_dict(),
                "layout": asdict(self._layout),
                "fingerprints": self._fingerprints,
            }

            def publish() -> Path:
                with _telling_bytes(total_bytes):
                    return self._store.publish(
                        temporary, work.state.step, fields, dict(sorted(files.items())), self._say
                    )

            outcome = self._attempt(publish)
        answer = self._circle.tell(outcome)
        assert answer is not None  # rank 0 has published, or says why not
        return answer

    def _begin(self, step: int, captured: CapturedState) -> "tuple[Path, int] | InherituneError":
        """Make the folder to write to if there is room: its path, and the bytes of the whole checkpoint."""
        error = None
        if captured.failure is not None:
            error = TrainingError(
                f"rank {self._world.rank} could not copy its state to host memory: {captured.failure}",
                action='set "async_save": false in the reliability block of the DeepSpeed config',
            )
        reports = self._circle.gather(_Report(captured.bytes, error=error))
        failed = _first_error(reports)
        total_bytes = sum(report.bytes for report in reports)
        made: Path | InherituneError | None = failed
        if self._world.is_main and failed is None:
            made = self._attempt(lambda: self._make_folder(step, total_bytes))
        answer = self._circle.tell(made)
        assert answer is not None  # rank 0 has made a folder, or says why not
        return answer if isinstance(answer, InherituneError) else (answer, total_bytes)

    def _make_folder(self, step: int, total_bytes: int) -> Path:
        require_space(self._store.folder, total_bytes, count=1)
        with _telling_bytes(total_bytes):
            self._temporary = self._store.begin(step)
        return self._temporary

    def _drop(self, error: InherituneError) -> None:
        """Remove what will not be published; not where another launch may write by now."""
        temporary, self._temporary = self._temporary, None
        if temporary is not None and not isinstance(error, CheckpointError):
            self._store.discard(temporary)

    def _write(self, shards: dict[str, Any], temporary: Path, needed_bytes: int) -> _Report:
        """Write this rank's files, each let go of when it is written."""
        files = {}
        try:
            for name in sorted(shards):
                path = temporary / name
                with storage_errors(path.parent):
                    path.parent.mkdir(mode=0o755, exist_ok=True)
                files[name] = write_shard(shards.pop(name), path, needed_bytes=needed_bytes)
        except InherituneError as error:
            return _Report(error=error)
        except Exception as error:  # noqa: BLE001 - the others wait for this rank's word
            return _Report(error=_defect(self._world, error))
        return _Report(files=files)

    def _attempt(self, work: Callable[[], Path]) -> Path | InherituneError:
        """Let rank 0 do something that the other ranks wait for; an error is told to them first."""
        try:
            with storage_errors(self._store.folder):
                return work()
        except InherituneError as error:
            return error
        except Exception as error:  # noqa: BLE001 - the others wait for rank 0's word
            return _defect(self._world, error)

    def _together(self, step: int, work: Callable[[], Value]) -> Value | InherituneError:
        try:
            return work()
        except RuntimeError as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            return TrainingError(
                f"the ranks have lost each other while they saved step {step}: {reason}",
                action="see how the missing rank has ended, then give the same command again: it goes on from the "
                "newest published checkpoint",
            )

    def _accept(self, outcome: Path | InherituneError) -> bool:
        """True for a published checkpoint; False for a refusal of the disk that the run may live with."""
        if isinstance(outcome, Path):
            return True
        if self._stops or not isinstance(outcome, StorageError):
            raise outcome
        return False

    def _tell_user(self, step: int, error: InherituneError) -> None:
        if isinstance(error, StorageError) and not self._stops:
            self.refusal = error.problem
            self._say(
                f"WARNING: step {step} is NOT saved, the run goes on, and older checkpoints are kept: {error.problem}"
            )

    @property
    def wants_save(self) -> bool:
        """Whether an asynchronous save has failed for good on this rank: the next `save` raises it on all ranks."""
        ended = self._writing.error or self._writing.result if self._writing is not None else None
        return isinstance(ended, BaseException) and (self._stops or not isinstance(ended, StorageError))

    def settle(self) -> bool:
        """Wait for what is under way.

        Returns:
            False if the disk has refused it and the run may go on without it.

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
        """Wait for what is under way; nothing is saved after that.

        Raises:
            InherituneError: As `save` does.
        """
        try:
            self.settle()
        finally:
            self._circle.close()

    def load(self, engine: Stateful, folder: Path) -> TrainState:
        """Restore a verified checkpoint that was saved under the same layout.

        Args:
            engine: All ranks' shares of it.
            folder: The same on all ranks.

        Raises:
            CheckpointError: On all ranks, if one of them does not see what rank 0 sees.
        """
        self._check_same(folder)
        for note in engine.load(folder):
            self._say(note)
        return self.state_of(folder)

    def _check_same(self, folder: Path) -> None:
        path = folder / MANIFEST
        seen = self._circle.gather(sha256_file(path) if path.is_file() else None)
        others = [str(rank) for rank, digest in enumerate(seen) if digest != seen[0] or digest is None]
        if others:
            raise CheckpointError(
                f"rank {', '.join(others)} does not see the {path} that rank 0 sees",
                allowed="one run folder that all machines share",
                action="put --runs-dir on a file system that every node mounts",
            )

    @staticmethod
    def state_of(folder: Path) -> TrainState:
        """The state in the manifest of a checkpoint."""
        manifest = read_manifest(folder)
        if manifest is None:
            raise CheckpointError(
                f"{folder / MANIFEST} is missing or not as it was written",
                action="give the same command again: it takes the newest checkpoint that is whole",
            )
        return TrainState.of(manifest["state"])


@dataclass(frozen=True)
class _Work:
    state: TrainState
    captured: CapturedState
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
        except BaseException as error:  # noqa: BLE001 - raised in `wait`, by the thread that has asked for it
            self.error = error

    def wait(self) -> Value | None:
        self._thread.join()
        if self.error is not None:
            raise self.error
        return self.result


def _first_error(reports: Sequence[_Report]) -> InherituneError | None:
    return next((report.error for report in reports if report.error is not None), None)


@contextmanager
def _telling_bytes(total_bytes: int) -> Iterator[None]:
    """Add to a refusal of the disk how many bytes the checkpoint takes."""
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
