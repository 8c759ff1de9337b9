"""Publishing of a checkpoint, also under kills and refusals of the disk."""

import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from inheritune_ds.checkpoints.manifest import MANIFEST, POINTER, published, read_manifest
from inheritune_ds.checkpoints.store import GENERATION, CheckpointStore
from inheritune_ds.errors import CheckpointError, StorageError
from tests.checkpoints.saved import MODEL, fields_of, names, newest, save, written


def test_published_checkpoint_is_intact_and_named_by_the_pointer(
    store: CheckpointStore, folder: Path, logged: Callable[[], list[str]]
) -> None:
    assert newest(store) is None
    assert store.claim_generation() == 1
    saved = save(store, 7)
    assert names(folder) == ["generation", "latest", "step-00000007"]
    assert (folder / POINTER).read_text() == "step-00000007\n"
    assert newest(store) == saved
    assert logged() == []
    manifest = read_manifest(saved)
    assert manifest is not None
    assert (manifest["step"], manifest["generation"], manifest["state"]["train_seconds"]) == (7, 1, 7.1)
    assert manifest["files"]["rank-00001.safetensors"] == {"bytes": 256, "blake3": blake3(MODEL).hexdigest()}


def test_only_the_newest_launch_publishes(store: CheckpointStore, folder: Path) -> None:
    assert store.claim_generation() == 1
    save(store, 4)
    begun = store.begin(8)
    later = CheckpointStore(folder, keep=3)
    assert later.claim_generation() == 2
    assert not begun.exists()  # the earlier launch's unfinished files are removed
    with pytest.raises(CheckpointError) as caught:
        store.begin(8)
    assert caught.value.problem == f"another launch (number 2, this is 1) has taken over {folder}"
    begun.mkdir()
    with pytest.raises(CheckpointError, match="has taken over"):
        store.publish(begun, 8, {}, written(begun, "late"))
    assert [path.name for path in published(folder)] == ["step-00000004"]
    assert (folder / POINTER).read_text() == "step-00000004\n"
    save(later, 8)


def test_last_of_two_launches_with_one_number_publishes(store: CheckpointStore, folder: Path) -> None:
    store.claim_generation()
    (folder / GENERATION).write_text("1 of another launch")  # claimed at the same moment, where no lock works
    with pytest.raises(CheckpointError, match=r"another launch \(number 1, this is 1\) has taken over"):
        store.begin(4)


@pytest.mark.parametrize("text", ["", "garbage", None])
def test_missing_generation_is_restored_from_the_manifests(
    text: str | None, store: CheckpointStore, folder: Path
) -> None:
    save(store, 4)
    if text is None:
        (folder / GENERATION).unlink()
    else:
        (folder / GENERATION).write_text(text)
    save(store, 8)  # no launch has claimed since
    (folder / GENERATION).unlink()
    assert CheckpointStore(folder, keep=3).claim_generation() == 2


def test_step_saved_again_replaces_the_first(store: CheckpointStore, folder: Path) -> None:
    save(store, 5)
    saved = save(store, 5, text="another state")
    assert (saved / "rank-00000.safetensors").read_text() == "another state of 5"
    assert newest(store) == saved
    assert names(folder) == ["generation", "latest", "step-00000005"]


def test_refused_rename_keeps_the_earlier_save_of_the_step(
    store: CheckpointStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = save(store, 5, text="older")
    begun = store.begin(5)
    files = written(begun, "newer")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path == begun:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(StorageError, match="Input/output error"):
            store.publish(begun, 5, {}, files)
    shutil.rmtree(begun)
    assert newest(store) == older
    assert (older / "rank-00000.safetensors").read_text() == "older of 5"
    assert names(folder) == ["generation", "latest", "step-00000005"]


class KilledError(BaseException):
    """SIGKILL: cleanup code does not run either."""


CALLS = ("rename", "replace", "fsync", "unlink", "rmdir", "mkdir", "open", "chmod")


def die_after(limit: int, patch: pytest.MonkeyPatch) -> None:
    """Let every file operation from the `limit`-th on end the process."""
    done = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal done
            if done == limit:
                raise KilledError
            done += 1
            return real(*arguments, **named)

        return call

    for name in CALLS:
        patch.setattr(os, name, counted(getattr(os, name)))


@pytest.mark.parametrize("step", [5, 8], ids=["replacing", "new"])
def test_kill_between_any_two_calls_leaves_the_old_or_the_new(
    step: int, store: CheckpointStore, folder: Path, logged: Callable[[], list[str]], tmp_path: Path
) -> None:
    save(store, 5, text="old state")
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept)
    seen: list[str] = []
    for limit in range(100):
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        killed = CheckpointStore(folder, keep=3)
        killed.claim_generation()
        with pytest.MonkeyPatch.context() as patch:
            die_after(limit, patch)
            try:
                save(killed, step, text="new state")
            except KilledError:
                ended = False
            else:
                ended = True
        after = CheckpointStore(folder, keep=3)
        after.claim_generation()
        found = newest(after)
        assert found is not None, limit
        assert not any(name.startswith(".") for name in names(folder)), limit
        seen.append((found / "rank-00000.safetensors").read_text())
        if ended:
            break
    assert ended, "100 calls are not enough"
    assert len(seen) > 15
    assert seen == sorted(seen, reverse=True), "the old one up to a moment, the new one from then on"
    assert set(seen) == {"old state of 5", f"new state of {step}"}
    assert logged() == []


def test_full_disk_keeps_the_older_checkpoint(
    store: CheckpointStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = save(store, 4)
    begun = store.begin(8)
    files = written(begun, "state of 8")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="cannot be written: No space left on device"):
            store.publish(begun, 8, {}, files)
    shutil.rmtree(begun)
    assert newest(store) == older
    assert names(folder) == ["generation", "latest", "step-00000004"]


def test_unwritable_pointer_is_logged_and_the_checkpoint_is_used(
    store: CheckpointStore, folder: Path, logged: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, 4)
    begun = store.begin(8)
    files = written(begun, "state of 8")
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if (folder / "step-00000008").exists() and not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        saved = store.publish(begun, 8, fields_of(8), files)
    problem = "WARNING: step 8 is saved, but latest does not name it: "
    assert logged() == [f"{problem}{folder / 'latest'} cannot be written: No space left on device"]
    assert newest(store) == saved
    assert logged() == []  # the pointer names an existing checkpoint
    assert (folder / "latest").read_text() == "step-00000004\n"
    assert names(folder) == ["generation", "latest", "step-00000004", "step-00000008"]


def test_files_that_differ_from_the_reports_are_not_published(store: CheckpointStore, folder: Path) -> None:
    begun = store.begin(4)
    files = written(begun, "state")
    (begun / "rank-00000.safetensors").write_text("stat")
    with pytest.raises(CheckpointError) as caught:
        store.publish(begun, 4, {}, files)
    assert caught.value.problem == (
        "the checkpoint of step 4 differs from the reports of its ranks: "
        "rank-00000.safetensors has 4 bytes instead of 5"
    )
    assert list(published(folder)) == []


@pytest.mark.skipif(sys.platform != "linux", reason="/proc names the open files")
def test_files_are_synced_before_the_pointer_names_them(
    store: CheckpointStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        done.append(f"rename to {Path(target).name}")
        rename(source, target)

    store.claim_generation()
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    save(store, 3)
    assert {"rank-00000.safetensors", "rank-00001.safetensors"} <= set(done[: done.index("rename to step-00000003")])
    pid = os.getpid()
    assert done[-5:] == [
        f".{MANIFEST}.{pid}.tmp",
        ".step-00000003.tmp",
        "rename to step-00000003",
        folder.name,
        f".{POINTER}.{pid}.tmp",
    ]
