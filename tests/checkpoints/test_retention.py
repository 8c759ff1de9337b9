"""Deletion of checkpoints by the rule, and the return to an earlier step."""

import os
from pathlib import Path
from typing import Any

import pytest

from inheritune_ds.checkpoints.manifest import POINTER, published, step_of
from inheritune_ds.checkpoints.retention import go_back, kept, prune
from inheritune_ds.checkpoints.store import CheckpointStore
from inheritune_ds.config.training import Checkpointing
from inheritune_ds.errors import CheckpointError
from tests.checkpoints.saved import flip, names, newest, save
from tests.conftest import Logged


def test_prune_keeps_the_newest_and_every_n_th(folder: Path, logged: Logged) -> None:
    store = CheckpointStore.of(folder, Checkpointing(interval_steps=10, keep=2, keep_every=3))
    for step in range(10, 101, 10):
        save(store, step)
        prune(store)
    assert [path.name[-3:] for path in published(folder)] == ["100", "090", "060", "030"]
    assert list(kept(store).values()) == ["newest 2", "newest 2", "every 30 steps", "every 30 steps"]
    assert logged() == []


def test_prune_keeps_what_an_earlier_rule_kept(folder: Path, logged: Logged) -> None:
    save(CheckpointStore(folder, keep=1, keep_every=4), 2, 4, 6, 8, 9)
    store = CheckpointStore(folder, keep=1, keep_every=3)
    assert {step_of(path): why for path, why in kept(store).items()} == {
        9: "newest 1",
        8: "by the rule at its save",
        6: "every 3 steps",
        4: "by the rule at its save",
    }
    assert [step_of(path) for path in prune(CheckpointStore(folder, keep=2))] == [6, 2]
    assert logged() == []


def test_prune_deletes_nothing_while_the_newest_is_damaged(folder: Path, logged: Logged) -> None:
    store = CheckpointStore(folder, keep=1)
    save(store, 1, 2, 3)
    flip(folder / "step-00000003" / "rank-00001.safetensors")
    assert prune(store) == []
    assert len(list(published(folder))) == 3
    [line] = logged()
    assert line.startswith(f"WARNING: checkpoint {folder / 'step-00000003'} is damaged: rank-00001.")
    assert line.endswith("; all older ones are kept")
    save(store, 4)
    assert [path.name for path in prune(store)] == ["step-00000003", "step-00000002", "step-00000001"]


def test_prune_logs_an_unreadable_folder(
    store: CheckpointStore, folder: Path, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, 1, 2, 3, 4)

    def refuse(_path: Path) -> Any:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refuse)
        assert prune(store) == []
    [line] = logged()
    assert line.startswith(f"WARNING: the checkpoints in {folder} cannot be read: Input/output error")
    assert line.endswith("; all older ones are kept")
    assert [path.name for path in prune(store)] == ["step-00000001"]


@pytest.mark.parametrize("call", ["rename", "rmdir"])
def test_checkpoint_that_cannot_be_deleted_is_logged_and_left_to_the_next_launch(
    call: str, folder: Path, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(folder, keep=1)
    save(store, 1, 2)

    def busy(path: Any, *_: Any, **__: Any) -> None:
        raise OSError(16, "Device or resource busy", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, busy)
        assert prune(store) == []
    [line] = logged()
    assert line.startswith(
        f"WARNING: checkpoint {folder / 'step-00000001'} cannot be deleted: Device or resource busy: "
    )
    store.claim_generation()
    prune(store)
    assert names(folder) == ["generation", "latest", "step-00000002"]


def test_go_back_deletes_the_later_checkpoints(store: CheckpointStore, folder: Path, logged: Logged) -> None:
    save(store, 1, 2, 3, 4)
    assert [path.name for path in go_back(store, 2)] == ["step-00000004", "step-00000003"]
    assert (folder / POINTER).read_text() == "step-00000002\n"
    assert newest(store) == folder / "step-00000002"
    assert logged() == []


def test_go_back_needs_an_intact_checkpoint(store: CheckpointStore, folder: Path) -> None:
    save(store, 2, 3)
    with pytest.raises(CheckpointError) as caught:
        go_back(store, 1)
    assert caught.value.problem == "the run cannot return to step 1: no checkpoint is that early"
    flip(folder / "step-00000002" / "rank-00001.safetensors")
    with pytest.raises(CheckpointError) as caught:
        go_back(store, 2)
    assert caught.value.problem.startswith("the run cannot return to step 2: step-00000002: rank-00001.")
    assert len(list(published(folder))) == 2
