import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from inheritune_ds.errors import CheckpointError, StorageError
from inheritune_ds.training import checkpoints
from inheritune_ds.training.checkpoints import (
    Checkpoints,
    Layout,
    RunState,
    find_fault,
    newest_step,
    published,
    refuse_other_layout,
)
from inheritune_ds.training.world import World

LAYOUT = Layout(world_size=1, zero_stage=1, precision="fp32")
MAIN, SECOND = World(0, 1, 0, 1, "single"), World(1, 2, 1, 2, "env")


class State:
    """Stands in for the engine: a rank's share is one file in a folder of its own."""

    def __init__(self, content: str = "") -> None:
        self.content = content

    def save(self, folder: Path) -> None:
        (folder / "engine").mkdir(exist_ok=True)
        (folder / "engine" / "rank0.pt").write_text(self.content, encoding="utf-8")
        (folder / "engine" / "model.pt").write_bytes(bytes(range(256)))

    def load(self, folder: Path) -> None:
        self.content = (folder / "engine" / "rank0.pt").read_text(encoding="utf-8")


@pytest.fixture
def meetings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The collectives called, in order; they do nothing in one process."""
    calls: list[str] = []
    monkeypatch.setattr(dist, "barrier", lambda: calls.append("barrier"))
    monkeypatch.setattr(dist, "broadcast_object_list", lambda _: calls.append("broadcast"))
    return calls


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def make(tmp_path: Path, meetings: list[str], lines: list[str]) -> Callable[..., Checkpoints]:
    def build(layout: Layout = LAYOUT, *, world: World = MAIN, keep: int = 3) -> Checkpoints:
        return Checkpoints(tmp_path, layout=layout, world=world, keep=keep, say=lines.append)

    return build


def state_at(step: int) -> RunState:
    return RunState(step=step, tokens=step * 64, skipped_steps=1, train_seconds=step * 0.1)


def save(store: Checkpoints, *steps: int) -> None:
    for step in steps:
        store.save(State(f"state of {step}"), state_at(step))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_resumed_as_it_was_saved(
    make: Callable[..., Checkpoints], tmp_path: Path, lines: list[str], meetings: list[str]
) -> None:
    save(make(), 7)
    assert names(tmp_path) == ["step-00000007"]
    assert names(tmp_path / "step-00000007") == ["engine", "manifest.json"]
    assert meetings == ["barrier"] * 3
    engine = State()
    assert make().resume(engine) == state_at(7)
    assert engine.content == "state of 7"
    assert meetings[3:] == ["broadcast"]
    assert lines == [f"resumed from {tmp_path / 'step-00000007'} (step 7, 448 tokens)"]


def test_nothing_is_resumed_where_nothing_is(make: Callable[..., Checkpoints], tmp_path: Path) -> None:
    assert make().resume(State()) is None
    (tmp_path / "step-3").mkdir()
    assert make().resume(State()) is None
    assert newest_step(tmp_path) == 0
    assert newest_step(tmp_path / "nowhere") == 0


def test_what_a_killed_launch_left_is_removed_by_rank_0(make: Callable[..., Checkpoints], tmp_path: Path) -> None:
    save(make(), 2)
    left = tmp_path / ".step-00000003.tmp"
    (left / "engine").mkdir(parents=True)
    (left / "engine" / "half.pt").touch()
    make(world=SECOND).resume(State())
    assert left.is_dir()
    assert make().resume(State()) == state_at(2)
    assert names(tmp_path) == ["step-00000002"]


def test_the_newest_ones_stay(make: Callable[..., Checkpoints], tmp_path: Path) -> None:
    save(make(keep=2), 90, 100, 1000, 1010)
    assert names(tmp_path) == ["step-00001000", "step-00001010"]
    assert [path.name for path in published(tmp_path)] == ["step-00001010", "step-00001000"]
    assert newest_step(tmp_path) == 1010


def test_older_ones_go_only_after_the_newer_one_is_there(
    make: Callable[..., Checkpoints], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(make(keep=1), 10)
    seen: list[list[str]] = []
    remove = shutil.rmtree

    def watched(path: Path, **options: Any) -> None:
        if path == tmp_path / "step-00000010":
            seen.append(names(tmp_path))
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    save(make(keep=1), 20)
    assert seen == [["step-00000010", "step-00000020"]]
    assert names(tmp_path) == ["step-00000020"]


def test_a_step_saved_again_replaces_the_first(make: Callable[..., Checkpoints], tmp_path: Path) -> None:
    save(make(), 5)
    make().save(State("again"), state_at(5))
    engine = State()
    assert make().resume(engine) == state_at(5)
    assert engine.content == "again"
    assert names(tmp_path) == ["step-00000005"]


def test_a_failed_save_publishes_nothing_and_keeps_the_older(make: Callable[..., Checkpoints], tmp_path: Path) -> None:
    class Full(State):
        def save(self, folder: Path) -> None:
            super().save(folder)
            raise OSError(28, "No space left on device", str(folder / "engine" / "model.pt"))

    save(make(keep=1), 5)
    with pytest.raises(StorageError) as caught:
        make(keep=1).save(Full("half"), state_at(6))
    assert caught.value.problem.endswith("model.pt cannot be written: No space left on device")
    assert caught.value.action.startswith("free some space")
    assert [path.name for path in published(tmp_path)] == ["step-00000005"]
    engine = State()
    assert make().resume(engine) == state_at(5)
    save(make(), 6)  # what the failed one left is not in the way
    assert find_fault(tmp_path / "step-00000006") is None
    assert names(tmp_path) == ["step-00000005", "step-00000006"]


def test_another_rank_writes_its_share_and_publishes_nothing(
    make: Callable[..., Checkpoints], tmp_path: Path, meetings: list[str]
) -> None:
    (tmp_path / ".step-00000004.tmp").mkdir()
    make(world=SECOND).save(State("second"), state_at(4))
    assert names(tmp_path) == [".step-00000004.tmp"]
    assert names(tmp_path / ".step-00000004.tmp") == ["engine"]
    assert meetings == ["barrier"] * 3  # as many as rank 0, or the ranks would wait for each other


def test_other_ranks_take_rank_0_s_choice(
    make: Callable[..., Checkpoints], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(make(keep=5), 1, 2)

    def choose(choice: list[Any]) -> None:
        choice[0] = tmp_path / "step-00000001"

    monkeypatch.setattr(dist, "broadcast_object_list", choose)
    engine = State()
    assert make(world=SECOND).resume(engine) == state_at(1)
    assert engine.content == "state of 1"

    def fail(choice: list[Any]) -> None:
        choice[0] = pickle.loads(pickle.dumps(CheckpointError("all bad", action="start over")))

    monkeypatch.setattr(dist, "broadcast_object_list", fail)
    with pytest.raises(CheckpointError, match=r"^all bad\n  do: start over$") as caught:
        make(world=SECOND).resume(engine)
    assert (caught.value.problem, caught.value.action) == ("all bad", "start over")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def link(path: Path) -> None:
    path.rename(path.parent.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent.parent / "elsewhere")


HARMS: list[tuple[Callable[[Path], None], str]] = [
    (Path.unlink, "is missing"),
    (shorten, "has 255 bytes instead of 256"),
    (flip, r"has sha256 [0-9a-f]{12}\.\.\. not [0-9a-f]{12}\.\.\."),
    (link, "lies outside the checkpoint"),
]


@pytest.mark.parametrize(("harm", "fault"), HARMS, ids=["missing", "short", "flipped", "link"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    harm: Callable[[Path], None],
    fault: str,
    make: Callable[..., Checkpoints],
    tmp_path: Path,
    lines: list[str],
) -> None:
    save(make(), 1, 2)
    harm(tmp_path / "step-00000002" / "engine" / "model.pt")
    engine = State()
    assert make().resume(engine) == state_at(1)
    assert engine.content == "state of 1"
    warning, told = lines
    assert told.startswith("resumed from ")
    expected = f"WARNING: checkpoint {tmp_path / 'step-00000002'} is damaged and is passed over: engine/model.pt "
    assert warning.startswith(expected)
    assert re.fullmatch(fault, warning.removeprefix(expected))


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def test_find_fault_trusts_no_manifest_that_was_changed(make: Callable[..., Checkpoints], tmp_path: Path) -> None:
    save(make(), 2)
    folder = tmp_path / "step-00000002"
    manifest = folder / "manifest.json"
    whole = manifest.read_bytes()
    assert find_fault(folder) is None
    for number in range(0, len(whole) * 8, 37):  # single flipped bits, all over the file
        content = bytearray(whole)
        content[number // 8] ^= 1 << (number % 8)
        manifest.write_bytes(bytes(content))
        harmless = content.isascii() and _same_json(content, whole)
        assert (find_fault(folder) is None) == harmless, number
    manifest.write_text("[1, 2]", encoding="utf-8")
    assert find_fault(folder) == "manifest.json is missing or not as it was written"
    manifest.unlink()
    assert find_fault(folder) == "manifest.json is missing or not as it was written"


def _same_json(one: bytes | bytearray, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


@pytest.mark.parametrize("name", ["/etc/hostname", "../outside", "engine/../../outside"])
def test_find_fault_follows_no_name_out_of_the_folder(
    name: str, make: Callable[..., Checkpoints], tmp_path: Path
) -> None:
    save(make(), 2)
    folder = tmp_path / "step-00000002"

    def rename(document: dict[str, Any]) -> None:
        document["files"][name] = document["files"].pop("engine/model.pt")
        del document["sha256"]
        document["sha256"] = checkpoints._digest(document)

    edit_manifest(folder, rename)
    assert find_fault(folder) == f"{name} lies outside the checkpoint"


def test_no_checkpoint_left_is_an_error_that_names_each(make: Callable[..., Checkpoints], tmp_path: Path) -> None:
    save(make(), 1, 2)
    (tmp_path / "step-00000001" / "engine" / "rank0.pt").unlink()
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        make().resume(State())
    assert caught.value.problem == (
        f"no checkpoint in {tmp_path} can be used: step-00000002: manifest.json is missing or not as it was written; "
        "step-00000001: engine/rank0.pt is missing"
    )
    assert "start over in another folder" in caught.value.action


@pytest.mark.parametrize(
    ("now", "differing"),
    [
        (Layout(2, 1, "fp32"), "world_size 1 there, 2 now"),
        (Layout(1, 3, "fp32"), "zero_stage 1 there, 3 now"),
        (Layout(1, 2, "bf16"), "zero_stage 1 there, 2 now, precision fp32 there, bf16 now"),
    ],
)
def test_another_layout_is_refused(
    now: Layout, differing: str, make: Callable[..., Checkpoints], tmp_path: Path
) -> None:
    save(make(), 1)
    with pytest.raises(CheckpointError) as caught:
        make(now).resume(State())
    assert caught.value.problem == f"{tmp_path / 'step-00000001'} was saved under another layout: {differing}"
    assert caught.value.allowed == "the same number of ranks, ZeRO stage and precision as when it was saved"
    with pytest.raises(CheckpointError) as early:
        refuse_other_layout(tmp_path, now)
    assert str(early.value) == str(caught.value)


def test_another_layout_is_looked_for_in_the_newest_manifest_that_is_whole(
    make: Callable[..., Checkpoints], tmp_path: Path
) -> None:
    other = Layout(2, 1, "fp32")
    refuse_other_layout(tmp_path, other)
    save(make(), 1, 2)
    refuse_other_layout(tmp_path, LAYOUT)
    edit_manifest(tmp_path / "step-00000002", lambda document: document["layout"].update(world_size=2))
    with pytest.raises(
        CheckpointError, match="step-00000001 was saved under another layout: world_size 1 there, 2 now"
    ):
        refuse_other_layout(tmp_path, other)


def test_the_manifest_says_state_layout_and_files(make: Callable[..., Checkpoints], tmp_path: Path) -> None:
    save(make(), 3)
    document = json.loads((tmp_path / "step-00000003" / "manifest.json").read_text(encoding="utf-8"))
    assert document["state"] == asdict(state_at(3))
    assert document["layout"] == {"world_size": 1, "zero_stage": 1, "precision": "fp32"}
    assert document["files"].keys() == {"engine/rank0.pt", "engine/model.pt"}
    assert document["files"]["engine/model.pt"]["bytes"] == 256


@pytest.mark.skipif(sys.platform != "linux", reason="/proc names the open files")
def test_everything_is_on_the_disk_before_it_is_published(
    make: Callable[..., Checkpoints], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    save(make(), 3)
    assert {"rank0.pt", "model.pt", "engine", tmp_path.name} <= set(synced)
    assert synced[-1] == tmp_path.name  # the rename itself, last
