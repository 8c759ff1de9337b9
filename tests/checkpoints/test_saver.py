"""Saves and loads of several ranks."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from inheritune_ds.checkpoints import saver as module
from inheritune_ds.checkpoints.fragments import KINDS, MASTER, key_of, write
from inheritune_ds.checkpoints.manifest import Checkpoint, examine
from inheritune_ds.checkpoints.saver import Saver
from inheritune_ds.checkpoints.snapshot import Snapshot
from inheritune_ds.checkpoints.store import CheckpointStore
from inheritune_ds.checkpoints.train_state import SavedLayout, TrainState
from inheritune_ds.config.reliability import Reliability
from inheritune_ds.distributed.world import World
from inheritune_ds.errors import CheckpointError, StorageError, TrainingError
from tests.checkpoints.ranks import FILES, RANKS, WEIGHTS, Ranks, State, all_weights, state_at
from tests.conftest import Logged

UNSAVED = "WARNING: step {} is NOT saved, training continues and older checkpoints are kept: "


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
def test_checkpoint_holds_the_files_of_all_ranks(tmp_path: Path, *, background: bool) -> None:
    ranks = Ranks(tmp_path, async_save=background)
    assert ranks.save(7) == [True, True]
    assert ranks.wait() == [True, True]
    folder = tmp_path / "step-00000007"
    assert all_weights(folder) == {7.0}
    document = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert document["files"].keys() == {name for _, name in FILES}
    assert TrainState.of(document["state"]) == state_at(7)
    assert document["layout"] == asdict(SavedLayout(RANKS, 1, "fp32"))
    assert document["fingerprints"] == {"recipe": "abc"}
    assert ranks.names() == ["generation", "latest", "step-00000007"]
    assert (tmp_path / "latest").read_text(encoding="utf-8") == "step-00000007\n"
    for saver in ranks.savers:
        assert saver.published_step == 7
        assert saver.last_save_s > 0.0


def test_training_continues_while_a_copy_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = threading.Event()

    def slow(fragments: Any, path: Path, *, needed_bytes: int) -> dict[str, Any]:
        assert disk.wait(20.0)
        return write(fragments, path, needed_bytes=needed_bytes)

    monkeypatch.setattr(module, "write", slow)
    ranks = Ranks(tmp_path, async_save=True)
    assert ranks.save(3) == [True, True]
    assert not (tmp_path / "step-00000003").exists()
    assert [saver.published_step for saver in ranks.savers] == [None, None]
    for engine in ranks.engines:
        engine.weights.fill_(4.0)
    disk.set()
    assert ranks.wait() == [True, True]
    assert all_weights(tmp_path / "step-00000003") == {3.0}


def test_save_waits_for_the_one_before(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, async_save=True)
    for step in range(1, 6):
        assert ranks.save(step) == [True, True]
    assert ranks.wait() == [True, True]
    assert ranks.names() == ["generation", "latest", "step-00000004", "step-00000005"]
    assert all_weights(tmp_path / "step-00000004") == {4.0}
    assert all_weights(tmp_path / "step-00000005") == {5.0}


@pytest.mark.parametrize(("rank", "name"), FILES)
@pytest.mark.parametrize("background", [False, True])
def test_refusal_of_any_file_is_logged_and_training_continues(  # noqa: PLR0917 - fixtures are parameters
    rank: int,
    name: str,
    background: bool,  # noqa: FBT001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    logged: Logged,
) -> None:
    ranks = Ranks(tmp_path, async_save=background)
    ranks.save(1)
    ranks.wait()
    refuse_at(monkeypatch, name, full_disk)
    saved = ranks.save(2)
    ended = ranks.wait()
    assert [saved, ended] == ([[True] * 2, [False] * 2] if background else [[False] * 2, [True] * 2])
    assert ranks.names() == ["generation", "latest", "step-00000001"]
    assert logged() == [UNSAVED.format(2) + f"{name} does not fit"] * RANKS
    assert [saver.published_step for saver in ranks.savers] == [1, 1], rank
    monkeypatch.setattr(module, "write", write)
    assert ranks.save(3) == [True, True]
    assert ranks.wait() == [True, True]
    assert all_weights(tmp_path / "step-00000003") == {3.0}


def test_refusal_stops_all_ranks_if_the_config_says_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: Logged
) -> None:
    ranks = Ranks(tmp_path, on_save_error="stop")
    ranks.save(1)
    refuse_at(monkeypatch, "rank-00001.safetensors", full_disk)
    raised = ranks.save(2)
    assert [(type(error), error.problem) for error in raised] == [
        (StorageError, "rank-00001.safetensors does not fit")
    ] * 2
    assert ranks.names() == ["generation", "latest", "step-00000001"]
    assert logged() == []


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20.0
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_refused_async_save_forces_a_save_that_raises_on_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(tmp_path, async_save=True, on_save_error="stop")
    assert not any(saver.wants_save for saver in ranks.savers)
    refuse_at(monkeypatch, "rank-00001.safetensors", full_disk)
    assert ranks.save(2) == [True, True]
    wait_for(lambda: all(saver.wants_save for saver in ranks.savers))
    assert [error.problem for error in ranks.save(3)] == ["rank-00001.safetensors does not fit"] * 2
    assert ranks.names() == ["generation"]


def test_defect_of_an_async_save_forces_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a defect")

    ranks = Ranks(tmp_path, async_save=True)
    for saver in ranks.savers:
        monkeypatch.setattr(saver, "_write_and_publish", broken)
    assert ranks.save(2) == [True, True]
    wait_for(lambda: all(saver.wants_save for saver in ranks.savers))
    for saver in ranks.savers:
        with pytest.raises(KeyError, match="a defect"):
            saver.wait()


def test_refused_async_save_forces_none_if_training_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(tmp_path, async_save=True)
    refuse_at(monkeypatch, "rank-00001.safetensors", full_disk)
    ranks.save(2)
    wait_for(lambda: all(saver.refusal for saver in ranks.savers))
    assert not any(saver.wants_save for saver in ranks.savers)
    assert ranks.wait() == [False, False]


@pytest.mark.parametrize(("bad", "rank"), [("rank-00001.safetensors", 1), ("rank-00000.safetensors", 0)])
@pytest.mark.parametrize("background", [False, True])
def test_defect_of_one_rank_ends_all(
    bad: str, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, background: bool
) -> None:
    refuse_at(monkeypatch, bad, lambda _: ValueError("no such thing"))
    ranks = Ranks(tmp_path, async_save=background)
    raised = ranks.save(2)
    if background:
        raised = ranks.wait()
    assert [type(error) for error in raised] == [TrainingError] * 2
    assert {error.problem for error in raised} == {f"rank {rank} could not save: ValueError: no such thing"}
    assert ranks.names() == ["generation"]


def test_defect_in_publishing_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(tmp_path)
    monkeypatch.setattr(ranks.store, "publish", lambda *_: [].pop())
    raised = ranks.save(2)
    assert {error.problem for error in raised} == {"rank 0 could not save: IndexError: pop from empty list"}
    assert ranks.names() == ["generation"]


@pytest.mark.parametrize("background", [False, True])
def test_save_without_a_rank_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, background: bool
) -> None:
    ranks = Ranks(tmp_path, async_save=background)
    ranks.save(1)
    ranks.wait()

    other_writes = threading.Event()

    def go(fragments: Any, path: Path, *, needed_bytes: int) -> dict[str, Any]:
        if path.name != "rank-00001.safetensors":
            other_writes.set()
            return write(fragments, path, needed_bytes=needed_bytes)
        other_writes.wait(20.0)
        ranks.barrier.meeting.abort()  # RuntimeError on the others, as for a killed rank
        raise SystemExit(str(path))

    monkeypatch.setattr(module, "write", go)
    with ThreadPoolExecutor(RANKS) as pool:
        pairs = zip(ranks.savers, ranks.engines, strict=True)
        saves: list[Any] = [pool.submit(saver.save, engine, state_at(2)) for saver, engine in pairs]
        if background:
            assert [save.result() for save in saves] == [True, True]
            saves = [pool.submit(saver.wait) for saver in ranks.savers]
        left, gone = (save.exception() for save in saves)
    assert isinstance(gone, SystemExit)
    assert isinstance(left, TrainingError)
    assert left.problem.startswith("the ranks have lost each other while they saved step 2: ")
    assert "rerun the same command to resume" in left.action
    assert ranks.names() == ["generation", "latest", "step-00000001"]


def test_nothing_is_written_without_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: Logged) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9999, 6400, 2399))
    monkeypatch.setattr(module, "write", None)
    ranks = Ranks(tmp_path)
    assert ranks.save(1) == [False, False]  # the ranks have 2 x 300 fp32 values
    reason = f"{tmp_path} has 2,399 bytes free, and a checkpoint takes 2,400"
    assert logged() == [UNSAVED.format(1) + reason] * RANKS
    ranks = Ranks(tmp_path, async_save=True, on_save_error="stop")
    assert ranks.save(1) == [True, True]
    assert [type(error) for error in ranks.wait()] == [StorageError] * 2
    assert ranks.names() == []


def test_copy_beyond_host_memory_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(tmp_path, async_save=True)
    monkeypatch.setattr(ranks.engines[1], "capture", lambda _: Snapshot(failure=MemoryError("600 GB")))
    assert ranks.save(1) == [True, True]  # under way: the ranks have not communicated yet
    raised = ranks.wait()
    assert {error.problem for error in raised} == {"rank 1 could not copy its state to host memory: 600 GB"}
    assert raised[0].action == 'set "async_save": false in the reliability block of the DeepSpeed config'


def test_superseded_launch_ends_on_all_ranks(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    ranks.save(1)
    CheckpointStore(tmp_path, keep=2).claim_generation()
    assert [type(error) for error in ranks.save(2)] == [CheckpointError] * 2
    assert ranks.names() == ["generation", "latest", "step-00000001"]


def checkpoint_in(folder: Path) -> Checkpoint:
    found = examine(folder)
    assert isinstance(found, Checkpoint), found
    return found


def test_all_ranks_load_a_checkpoint(tmp_path: Path, logged: Logged) -> None:
    ranks = Ranks(tmp_path)
    ranks.save(7)
    checkpoint = checkpoint_in(tmp_path / "step-00000007")
    assert ranks.each(lambda saver, engine: saver.load(engine, checkpoint)) == [state_at(7)] * 2
    assert [engine.loaded for engine in ranks.engines] == [checkpoint.path] * 2
    assert sorted(logged()) == ["rank 0 has loaded", "rank 1 has loaded"]


@pytest.mark.parametrize("there", [False, True])
def test_rank_without_the_shared_folder_is_named(tmp_path: Path, *, there: bool) -> None:
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
def test_incomplete_or_overlapping_fragments_are_not_published(
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


def test_manifest_holds_the_steps_of_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_close_waits_for_the_save_under_way(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, async_save=True)
    ranks.save(9)
    assert ranks.each(lambda saver, _: saver.close()) == [None, None]
    assert all_weights(tmp_path / "step-00000009") == {9.0}
    assert all(group.closed for group in ranks.groups)


def test_one_rank_needs_no_process_group(tmp_path: Path) -> None:
    saver = Saver(
        CheckpointStore(tmp_path, keep=1),
        layout=SavedLayout(1, 1, "fp32"),
        world=World(0, 1, 0, 1, "single"),
        reliability=Reliability(),
        fingerprints={},
    )
    engine = State(0, ranks=1)
    assert saver.save(engine, state_at(1))
    assert saver.load(engine, checkpoint_in(tmp_path / "step-00000001")) == state_at(1)
    saver.close()
