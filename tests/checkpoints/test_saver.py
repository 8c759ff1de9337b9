"""Several ranks as threads of one process that exchange values over a barrier; tests/campaign has process groups."""

import json
import pickle
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from inheritune_ds.checkpoints import saver as module
from inheritune_ds.checkpoints.fragments import KINDS, MASTER, key_of, write
from inheritune_ds.checkpoints.manifest import Checkpoint, examine, find_fault
from inheritune_ds.checkpoints.saver import Saver, Value
from inheritune_ds.checkpoints.snapshot import PinnedBuffers, Snapshot
from inheritune_ds.checkpoints.store import CheckpointStore
from inheritune_ds.checkpoints.train_state import SavedLayout, TrainState
from inheritune_ds.config.reliability import Reliability
from inheritune_ds.distributed.coordination import ObjectGroup
from inheritune_ds.distributed.world import World
from inheritune_ds.errors import CheckpointError, InherituneError, StorageError, TrainingError

RANKS = 2
UNSAVED = "WARNING: step {} is NOT saved, the run goes on, and older checkpoints are kept: "
FILES = [(0, "rank-00000.safetensors"), (1, "rank-00001.safetensors")]
WEIGHTS = 300


class Barrier:
    """What the groups of all ranks share; values travel as pickle, as they do between processes."""

    def __init__(self, size: int) -> None:
        self.values: list[bytes] = [b""] * size
        self.meeting = threading.Barrier(size, timeout=20.0)


class ThreadGroup(ObjectGroup):
    def __init__(self, barrier: Barrier, rank: int) -> None:
        self._barrier, self._rank = barrier, rank
        self.closed = False

    def gather(self, value: Value) -> Sequence[Value]:
        self._barrier.values[self._rank] = pickle.dumps(value)
        self._barrier.meeting.wait()
        values = [pickle.loads(value) for value in self._barrier.values]
        self._barrier.meeting.wait()
        return values

    def broadcast(self, value: Value) -> Value:
        return self.gather(value)[0]

    def close(self) -> None:
        self.closed = True


class State:
    """In the engine's place: a parameter of which each rank owns WEIGHTS elements."""

    def __init__(self, rank: int, ranks: int = RANKS) -> None:
        self.rank, self.ranks, self.weights = rank, ranks, torch.zeros(WEIGHTS)
        self.loaded: Path | None = None

    def capture(self, buffers: PinnedBuffers | None) -> Snapshot:
        held = self.weights if buffers is None else buffers.copy("weights", self.weights)
        fragments = {key_of("w", MASTER, self.rank * WEIGHTS): held}
        return Snapshot(fragments, {"w": {"shape": [self.ranks * WEIGHTS], "step": None}}, {"counters": {}})

    def load(self, checkpoint: Checkpoint) -> Sequence[str]:
        self.loaded = checkpoint.path
        return [f"rank {self.rank} has loaded"]


class Ranks:
    """Two ranks of one run; `each` lets them do something together."""

    def __init__(self, folder: Path, **reliability: Any) -> None:
        self.folder = folder
        self.lines: list[list[str]] = [[] for _ in range(RANKS)]
        self.barrier = Barrier(RANKS)
        self.groups = [ThreadGroup(self.barrier, rank) for rank in range(RANKS)]
        self.engines = [State(rank) for rank in range(RANKS)]
        self.store = CheckpointStore(folder, keep=2)
        self.checkpoints = [
            Saver(
                self.store if rank == 0 else CheckpointStore(folder / "not for this rank", keep=1),
                layout=SavedLayout(RANKS, 1, "fp32"),
                world=World(rank, RANKS, rank, RANKS, "env"),
                reliability=Reliability(**reliability),
                fingerprints={"recipe": "abc"},
                say=self.lines[rank].append,
                group=self.groups[rank],
            )
            for rank in range(RANKS)
        ]

    def each(self, work: Callable[[Saver, State], Any]) -> list[Any]:
        """What every rank returns, or raises."""

        def attempt(rank: int) -> Any:
            try:
                return work(self.checkpoints[rank], self.engines[rank])
            except InherituneError as error:
                return error

        with ThreadPoolExecutor(RANKS) as pool:
            return list(pool.map(attempt, range(RANKS)))

    def save(self, step: int) -> list[Any]:
        for engine in self.engines:
            engine.weights.fill_(step)
        return self.each(lambda checkpoints, engine: checkpoints.save(engine, state_at(step)))

    def settle(self) -> list[Any]:
        return self.each(lambda checkpoints, _: checkpoints.wait())

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


def state_at(step: int) -> TrainState:
    return TrainState(step=step, tokens=step * 64, skipped_steps=1, train_seconds=step * 0.1)


def weights_of(folder: Path, name: str) -> float:
    [values] = load_file(folder / name).values()
    assert torch.equal(values, values[:1].expand_as(values))
    return float(values[0])


def all_weights(folder: Path) -> set[float]:
    assert find_fault(folder) is None
    return {weights_of(folder, name) for _, name in FILES}


def refuse_at(monkeypatch: pytest.MonkeyPatch, bad: str, error: Callable[[Path], Exception]) -> None:
    def refuse(fragments: Any, path: Path, *, needed_bytes: int) -> dict[str, Any]:
        if path.name == bad:
            path.write_bytes(b"half of it")
            raise error(path)
        return write(fragments, path, needed_bytes=needed_bytes)

    monkeypatch.setattr(module, "write", refuse)


def full_disk(path: Path) -> Exception:
    return StorageError(f"{path.name} does not fit", action="free some space")


@pytest.mark.parametrize("background", [False, True])
def test_a_checkpoint_holds_the_files_of_all_ranks(tmp_path: Path, *, background: bool) -> None:
    ranks = Ranks(tmp_path, async_save=background)
    assert ranks.save(7) == [True, True]
    assert ranks.settle() == [True, True]
    folder = tmp_path / "step-00000007"
    assert all_weights(folder) == {7.0}
    document = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert document["files"].keys() == {name for _, name in FILES}
    assert TrainState.of(document["state"]) == state_at(7)
    assert document["layout"] == asdict(SavedLayout(RANKS, 1, "fp32"))
    assert document["fingerprints"] == {"recipe": "abc"}
    assert ranks.names() == ["generation", "latest", "step-00000007"]
    assert (tmp_path / "latest").read_text(encoding="utf-8") == "step-00000007\n"
    for checkpoints in ranks.checkpoints:
        assert checkpoints.published_step == 7
        assert checkpoints.last_save_s > 0.0


def test_training_goes_on_while_a_copy_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = threading.Event()

    def slow(fragments: Any, path: Path, *, needed_bytes: int) -> dict[str, Any]:
        assert disk.wait(20.0)
        return write(fragments, path, needed_bytes=needed_bytes)

    monkeypatch.setattr(module, "write", slow)
    ranks = Ranks(tmp_path, async_save=True)
    assert ranks.save(3) == [True, True]
    assert not (tmp_path / "step-00000003").exists()
    assert [checkpoints.published_step for checkpoints in ranks.checkpoints] == [None, None]
    for engine in ranks.engines:
        engine.weights.fill_(4.0)
    disk.set()
    assert ranks.settle() == [True, True]
    assert all_weights(tmp_path / "step-00000003") == {3.0}


def test_a_save_waits_for_the_one_before(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, async_save=True)
    for step in range(1, 6):
        assert ranks.save(step) == [True, True]
    assert ranks.settle() == [True, True]
    assert ranks.names() == ["generation", "latest", "step-00000004", "step-00000005"]
    assert all_weights(tmp_path / "step-00000004") == {4.0}
    assert all_weights(tmp_path / "step-00000005") == {5.0}


@pytest.mark.parametrize(("rank", "name"), FILES)
@pytest.mark.parametrize("background", [False, True])
def test_a_refusal_of_any_file_is_told_and_survived(
    rank: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, background: bool
) -> None:
    ranks = Ranks(tmp_path, async_save=background)
    ranks.save(1)
    ranks.settle()
    refuse_at(monkeypatch, name, full_disk)
    saved = ranks.save(2)
    ended = ranks.settle()
    assert [saved, ended] == ([[True] * 2, [False] * 2] if background else [[False] * 2, [True] * 2])
    assert ranks.names() == ["generation", "latest", "step-00000001"]
    assert ranks.lines[0] == [UNSAVED.format(2) + f"{name} does not fit"]
    assert [checkpoints.published_step for checkpoints in ranks.checkpoints] == [1, 1], rank
    monkeypatch.setattr(module, "write", write)
    assert ranks.save(3) == [True, True]
    assert ranks.settle() == [True, True]
    assert all_weights(tmp_path / "step-00000003") == {3.0}


def test_a_refusal_stops_all_ranks_if_the_config_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(tmp_path, on_save_error="stop")
    ranks.save(1)
    refuse_at(monkeypatch, "rank-00001.safetensors", full_disk)
    raised = ranks.save(2)
    assert [(type(error), error.problem) for error in raised] == [
        (StorageError, "rank-00001.safetensors does not fit")
    ] * 2
    assert ranks.names() == ["generation", "latest", "step-00000001"]
    assert ranks.lines[0] == []


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20.0
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_refusal_behind_the_training_is_wished_for_and_raised_by_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(tmp_path, async_save=True, on_save_error="stop")
    assert not any(checkpoints.wants_save for checkpoints in ranks.checkpoints)
    refuse_at(monkeypatch, "rank-00001.safetensors", full_disk)
    assert ranks.save(2) == [True, True]
    wait_for(lambda: all(checkpoints.wants_save for checkpoints in ranks.checkpoints))
    assert [error.problem for error in ranks.save(3)] == ["rank-00001.safetensors does not fit"] * 2
    assert ranks.names() == ["generation"]


def test_a_background_save_that_nobody_has_foreseen_to_fail_wishes_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_work: object) -> None:
        raise KeyError("a defect")

    ranks = Ranks(tmp_path, async_save=True)
    for checkpoints in ranks.checkpoints:
        monkeypatch.setattr(checkpoints, "_write_and_publish", broken)
    assert ranks.save(2) == [True, True]
    wait_for(lambda: all(checkpoints.wants_save for checkpoints in ranks.checkpoints))
    for checkpoints in ranks.checkpoints:
        with pytest.raises(KeyError, match="a defect"):
            checkpoints.wait()


def test_a_run_that_goes_on_wishes_for_no_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(tmp_path, async_save=True)
    refuse_at(monkeypatch, "rank-00001.safetensors", full_disk)
    ranks.save(2)
    wait_for(lambda: bool(ranks.lines[0]))
    assert not any(checkpoints.wants_save for checkpoints in ranks.checkpoints)
    assert ranks.settle() == [False, False]


@pytest.mark.parametrize(("bad", "rank"), [("rank-00001.safetensors", 1), ("rank-00000.safetensors", 0)])
@pytest.mark.parametrize("background", [False, True])
def test_a_defect_of_one_rank_ends_all(
    bad: str, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, background: bool
) -> None:
    refuse_at(monkeypatch, bad, lambda _: ValueError("no such thing"))
    ranks = Ranks(tmp_path, async_save=background)
    raised = ranks.save(2)
    if background:
        raised = ranks.settle()
    assert [type(error) for error in raised] == [TrainingError] * 2
    assert {error.problem for error in raised} == {f"rank {rank} could not save: ValueError: no such thing"}
    assert ranks.names() == ["generation"]


def test_a_defect_in_publishing_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(tmp_path)
    monkeypatch.setattr(ranks.store, "publish", lambda *_: [].pop())
    raised = ranks.save(2)
    assert {error.problem for error in raised} == {"rank 0 could not save: IndexError: pop from empty list"}
    assert ranks.names() == ["generation"]


@pytest.mark.parametrize("background", [False, True])
def test_a_rank_that_goes_leaves_nothing_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, background: bool
) -> None:
    ranks = Ranks(tmp_path, async_save=background)
    ranks.save(1)
    ranks.settle()

    other_writes = threading.Event()

    def go(fragments: Any, path: Path, *, needed_bytes: int) -> dict[str, Any]:
        if path.name != "rank-00001.safetensors":
            other_writes.set()
            return write(fragments, path, needed_bytes=needed_bytes)
        other_writes.wait(20.0)
        ranks.barrier.meeting.abort()  # what the others see of a killed one: RuntimeError
        raise SystemExit(str(path))

    monkeypatch.setattr(module, "write", go)
    with ThreadPoolExecutor(RANKS) as pool:
        saves = [
            pool.submit(checkpoints.save, engine, state_at(2))
            for checkpoints, engine in zip(ranks.checkpoints, ranks.engines, strict=True)
        ]
        if background:
            saves = [pool.submit(checkpoints.wait) for save, checkpoints in _done(saves, ranks.checkpoints)]
        left, gone = (save.exception() for save in saves)
    assert isinstance(gone, SystemExit)
    assert isinstance(left, TrainingError)
    assert left.problem.startswith("the ranks have lost each other while they saved step 2: ")
    assert "give the same command again" in left.action
    assert ranks.names() == ["generation", "latest", "step-00000001"]


def _done(saves: list[Any], checkpoints: list[Saver]) -> list[tuple[Any, Saver]]:
    return [(save.result(), each) for save, each in zip(saves, checkpoints, strict=True)]


def test_nothing_is_written_without_room_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9999, 6400, 2399))
    monkeypatch.setattr(module, "write", None)
    ranks = Ranks(tmp_path)
    assert ranks.save(1) == [False, False]  # the ranks have 2 x 300 fp32 values
    reason = f"{tmp_path} has 2,399 bytes free, and a checkpoint takes 2,400"
    assert ranks.lines[0] == [UNSAVED.format(1) + reason]
    assert ranks.names() == []


def test_a_background_save_without_room_is_told_when_it_is_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9999, 6400, 2399))
    ranks = Ranks(tmp_path, async_save=True, on_save_error="stop")
    assert ranks.save(1) == [True, True]
    assert [type(error) for error in ranks.settle()] == [StorageError] * 2
    assert ranks.names() == []


def test_a_copy_that_host_memory_does_not_hold_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(tmp_path, async_save=True)
    monkeypatch.setattr(ranks.engines[1], "capture", lambda _: Snapshot(failure=MemoryError("600 GB")))
    assert ranks.save(1) == [True, True]  # on its way: the ranks have not met yet
    raised = ranks.settle()
    assert {error.problem for error in raised} == {"rank 1 could not copy its state to host memory: 600 GB"}
    assert raised[0].action == 'set "async_save": false in the reliability block of the DeepSpeed config'


def test_a_launch_that_was_taken_over_ends_on_all_ranks(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    ranks.save(1)
    CheckpointStore(tmp_path, keep=2).claim_generation()
    assert [type(error) for error in ranks.save(2)] == [CheckpointError] * 2
    assert ranks.names() == ["generation", "latest", "step-00000001"]


def checkpoint_in(folder: Path) -> Checkpoint:
    found = examine(folder)
    assert isinstance(found, Checkpoint), found
    return found


def test_ranks_load_what_they_see_alike(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    ranks.save(7)
    checkpoint = checkpoint_in(tmp_path / "step-00000007")
    assert ranks.each(lambda saver, engine: saver.load(engine, checkpoint)) == [state_at(7)] * 2
    assert [engine.loaded for engine in ranks.engines] == [checkpoint.path] * 2
    assert ranks.lines == [["rank 0 has loaded"], ["rank 1 has loaded"]]


@pytest.mark.parametrize("there", [False, True])
def test_a_rank_without_the_shared_folder_is_named(tmp_path: Path, *, there: bool) -> None:
    ranks = Ranks(tmp_path / "shared")
    ranks.save(7)
    checkpoint = checkpoint_in(tmp_path / "shared" / "step-00000007")
    other = replace(checkpoint, path=tmp_path / "own" / "step-00000007")
    if there:
        other.path.mkdir(parents=True)
        (other.path / "manifest.json").write_text("{}", encoding="utf-8")
    raised = ranks.each(lambda saver, engine: saver.load(engine, other if engine.rank else checkpoint))
    assert [type(error) for error in raised] == [CheckpointError] * 2
    assert raised[0].problem == f"rank 1 does not see the {checkpoint.path / 'manifest.json'} that rank 0 sees"
    assert raised[0].action == "put --runs-dir on a file system that every node mounts"
    assert [engine.loaded for engine in ranks.engines] == [None, None]


@pytest.mark.parametrize(
    ("start", "found"), [(WEIGHTS + 1, "300 to 300 of w/fp32 nowhere"), (299, "299 to 299 of w/fp32 twice")]
)
def test_fragments_that_do_not_cover_every_element_once_are_not_published(
    start: int, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(tmp_path)
    ranks.save(1)
    held = ranks.engines[1].capture(None)
    moved = replace(held, fragments={key_of("w", MASTER, start): ranks.engines[1].weights})
    monkeypatch.setattr(ranks.engines[1], "capture", lambda _: moved)
    raised = ranks.save(2)
    assert [type(error) for error in raised] == [TrainingError] * 2
    assert raised[1].problem == f"the fragments in {tmp_path / '.step-00000002.tmp'} hold elements {found}"
    assert ranks.names() == ["generation", "latest", "step-00000001"]


def test_steps_of_all_ranks_meet_in_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(tmp_path)

    def capture(_: object, rank: int) -> Snapshot:
        fragments = {key_of(f"w{rank}", kind, 0): torch.ones(3) for kind in KINDS}
        parameters = {f"w{number}": {"shape": [3], "step": 5 if number == rank else None} for number in range(RANKS)}
        return Snapshot(fragments, parameters)

    for rank, engine in enumerate(ranks.engines):
        monkeypatch.setattr(engine, "capture", partial(capture, rank=rank))
    assert ranks.save(3) == [True, True]
    parameters = checkpoint_in(tmp_path / "step-00000003").manifest["parameters"]
    assert parameters == {f"w{number}": {"shape": [3], "step": 5} for number in range(RANKS)}


def test_closing_waits_for_what_is_under_way(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, async_save=True)
    ranks.save(9)
    assert ranks.each(lambda checkpoints, _: checkpoints.close()) == [None, None]
    assert all_weights(tmp_path / "step-00000009") == {9.0}
    assert all(group.closed for group in ranks.groups)


def test_one_rank_needs_no_process_group(tmp_path: Path) -> None:
    checkpoints = Saver(
        CheckpointStore(tmp_path, keep=1),
        layout=SavedLayout(1, 1, "fp32"),
        world=World(0, 1, 0, 1, "single"),
        reliability=Reliability(),
        fingerprints={},
        say=print,
    )
    engine = State(0, ranks=1)
    assert checkpoints.save(engine, state_at(1))
    assert checkpoints.load(engine, checkpoint_in(tmp_path / "step-00000001")) == state_at(1)
    checkpoints.close()
