"""The choice of the checkpoint to resume from."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inheritune_ds.checkpoints.manifest import MANIFEST, POINTER, find_fault
from inheritune_ds.checkpoints.store import CheckpointStore
from inheritune_ds.errors import CheckpointError
from tests.checkpoints.saved import newest, save
from tests.conftest import Logged


def test_files_of_another_user_are_not_loaded(
    store: CheckpointStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = save(store, 2)
    me = os.geteuid()
    assert find_fault(saved) is None
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    assert find_fault(saved) == f"its folder belongs to user {me}, not to you ({me + 1})"
    with pytest.raises(CheckpointError) as caught:
        store.newest_intact()
    assert caught.value.problem == (
        f"{folder} belongs to user {me}, not to you ({me + 1}); "
        "a checkpoint is loaded only if no other user can have written it"
    )
    assert "copy it as yourself if you trust" in caught.value.action
    with pytest.raises(CheckpointError, match="belongs to user"):
        CheckpointStore(folder, keep=3).claim_generation()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a file away")
def test_one_file_of_another_user_is_not_loaded(store: CheckpointStore) -> None:
    saved = save(store, 2)
    os.chown(saved / "rank-00001.safetensors", 65534, -1)
    assert find_fault(saved) == "rank-00001.safetensors belongs to user 65534, not to you (0)"


def test_world_writable_folder_is_refused(store: CheckpointStore, folder: Path) -> None:
    save(store, 2)
    folder.chmod(0o777)
    with pytest.raises(CheckpointError) as caught:
        store.newest_intact()
    assert caught.value.problem.startswith(f"{folder} can be written by any user (mode 777)")
    assert f"chmod o-w {folder}" in caught.value.action


def test_saved_files_are_not_world_writable_under_any_umask(store: CheckpointStore, folder: Path) -> None:
    before = os.umask(0)
    try:
        saved = save(store, 2)
    finally:
        os.umask(before)
    assert newest(store) == saved
    assert not any(path.stat().st_mode & stat.S_IWOTH for path in [folder, saved, *saved.rglob("*")])


def test_error_lists_every_damaged_checkpoint(store: CheckpointStore, folder: Path, logged: Logged) -> None:
    save(store, 1, 2)
    (folder / "step-00000001" / "rank-00000.safetensors").unlink()
    (folder / "step-00000002" / MANIFEST).unlink()
    with pytest.raises(CheckpointError) as caught:
        store.newest_intact()
    assert caught.value.exit_code == 4
    assert caught.value.problem == (
        f"no checkpoint in {folder} can be used: step-00000002: manifest.json is missing or not as it was written; "
        "step-00000001: rank-00000.safetensors is missing"
    )
    assert f"`inheritune-ds checkpoints {folder.parent} verify`" in caught.value.action
    assert "--fresh" in caught.value.action
    assert len(logged()) == 2


@pytest.mark.parametrize(
    ("trace", "evidence"),
    [
        ({"checkpoints/latest": ""}, "latest is there, so this run has saved before"),
        ({"status.json": '{"step": 8}'}, "status.json says that step 8 was saved"),
        ({"status.json": '{"step": 0, "saved_step": 12}'}, "status.json says that step 12 was saved"),
    ],
)
def test_run_with_missing_checkpoints_does_not_start_over(
    trace: dict[str, str], evidence: str, store: CheckpointStore, folder: Path
) -> None:
    folder.mkdir(parents=True)
    for name, text in trace.items():
        (folder.parent / name).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        store.newest_intact()
    assert caught.value.problem == f"{folder} holds no checkpoint, but {evidence}"
    assert "--fresh" in caught.value.action


@pytest.mark.parametrize("status", [None, '{"step": 0, "saved_step": 0}', "[]", "{"])
def test_run_that_never_saved_starts_at_step_0(
    status: str | None, store: CheckpointStore, folder: Path, logged: Logged
) -> None:
    store.claim_generation()
    (folder.parent / "metrics.jsonl").touch()
    if status is not None:
        (folder.parent / "status.json").write_text(status)
    assert newest(store) is None
    assert logged() == []


def a_folder(pointer: Path) -> None:
    pointer.unlink()
    pointer.mkdir()


POINTERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "is missing"),
    "empty": (lambda pointer: pointer.write_text(""), "is empty"),
    "garbage": (lambda pointer: pointer.write_bytes(b"\x00\xff\xfe"), "is not text"),
    "text": (
        lambda pointer: pointer.write_text("global_step6"),
        "holds 'global_step6', which is not the name of a checkpoint",
    ),
    "outside": (lambda pointer: pointer.write_text("../x"), "holds '../x', which is not the name of a checkpoint"),
    "absent tag": (lambda pointer: pointer.write_text("step-00000099\n"), "names step-00000099, which is not there"),
    "unreadable": (a_folder, "cannot be read (Is a directory)"),
}


@pytest.mark.parametrize("name", POINTERS)
def test_invalid_pointer_is_logged_and_ignored(name: str, store: CheckpointStore, folder: Path, logged: Logged) -> None:
    saved = save(store, 1, 2)
    harm, fault = POINTERS[name]
    harm(folder / POINTER)
    assert newest(store) == saved
    assert logged() == [f"WARNING: {folder / POINTER} {fault}; the newest intact checkpoint is used"]


def test_folder_at_the_pointer_s_path_is_kept(store: CheckpointStore, folder: Path) -> None:
    (folder / POINTER / "mine").mkdir(parents=True)
    saved = save(store, 1, 2)
    assert newest(store) == saved
    assert (folder / POINTER / "mine").is_dir()


def test_unreadable_folder_is_an_error(store: CheckpointStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, 1)

    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    for call in (store.newest, store.claim_generation, store.newest_intact):
        with pytest.raises(CheckpointError) as caught:
            call()
        assert caught.value.problem == f"the checkpoints in {folder} cannot be read: Permission denied: {folder}"
