import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from inheritune_ds.config.loading import load_recipe
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.errors import RunFolderError, StorageError
from inheritune_ds.run.folder import SAME_ERROR_S, FolderBusyError, RunFolder, finished_before
from inheritune_ds.run.status import read_status, write_status


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("quickstart")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    made = RunFolder(tmp_path / "runs" / "quickstart")
    yield made
    made.release()


def test_claim_makes_the_folder_and_writes_the_resolved_recipe(folder: RunFolder, recipe: Recipe) -> None:
    folder.claim(recipe)
    assert folder.checkpoints.is_dir()
    assert folder.eval.is_dir()
    assert load_recipe(str(folder.path / "recipe.resolved.yaml")) == recipe
    assert (folder.target, folder.export) == (folder.path / "target", folder.path / "export")


def test_the_first_failure_of_a_launch_stays_in_the_status(
    folder: RunFolder, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    folder.mark_failed("not mine", exit_code=1, rank=0)
    assert read_status(folder.path) == {}, "rank 0 has not claimed it"
    folder.claim(recipe)
    folder.mark("preparing")
    RunFolder(folder.path).mark_failed("out of memory", exit_code=10, rank=3)
    assert slept == [SAME_ERROR_S], "rank 0 has time for an error that all ranks raise"
    folder.mark_failed("another rank has gone", exit_code=11, rank=0)
    found = read_status(folder.path)
    assert (found["state"], found["reason"], found["exit_code"]) == ("failed", "rank 3: out of memory", 10)
    folder.mark("preparing")  # the next launch
    folder.mark_failed("the disk is full", exit_code=5, rank=0)
    assert read_status(folder.path)["reason"] == "the disk is full"


def test_claim_removes_unfinished_files_of_a_killed_launch(folder: RunFolder, recipe: Recipe) -> None:
    folder.claim(recipe)
    folder.release()
    (folder.path / "report").mkdir()
    killed = [
        folder.path / ".status.json.4711.tmp",
        folder.eval / ".validation-step-00000004.json.4711.tmp",
        folder.path / "report" / ".report.md.4711.tmp",
    ]
    others = [folder.path / ".notes.tmp", folder.path / ".status.json.tmp", folder.path / "status.json.4711.tmp"]
    for path in killed + others:
        path.write_text("{")
    staging = folder.path / ".export.node-1.4711.tmp"  # publish.py's, of another machine perhaps
    staging.mkdir()
    folder.claim(recipe)
    assert not any(path.exists() for path in killed)
    assert all(path.exists() for path in [*others, staging])


def test_same_recipe_may_change_description_logging_and_checkpoints(folder: RunFolder, recipe: Recipe) -> None:
    folder.claim(recipe)
    written = (folder.path / "recipe.resolved.yaml").stat().st_mtime_ns
    folder.release()
    folder.claim(recipe)
    assert (folder.path / "recipe.resolved.yaml").stat().st_mtime_ns == written
    folder.release()
    changed = load_recipe("quickstart", ["description=another", "logging.interval_steps=3", "checkpoint.keep=7"])
    folder.claim(changed)
    assert load_recipe(str(folder.path / "recipe.resolved.yaml")) == changed


def test_corrected_recipe_claims_a_folder_without_training(folder: RunFolder, recipe: Recipe) -> None:
    folder.claim(recipe)
    folder.release()
    corrected = load_recipe("quickstart", ["seed=7"])
    folder.claim(corrected)
    assert load_recipe(str(folder.path / "recipe.resolved.yaml")) == corrected
    folder.release()
    (folder.checkpoints / "step-00000001").mkdir()
    with pytest.raises(RunFolderError, match="belongs to another recipe"):
        folder.claim(recipe)


def test_folder_of_another_recipe_is_refused_by_key(folder: RunFolder, recipe: Recipe) -> None:
    folder.claim(recipe)
    (folder.path / "metrics.jsonl").touch()
    folder.release()
    before = (folder.path / "recipe.resolved.yaml").read_bytes()
    other = load_recipe("quickstart", ["seed=7", "optimizer.lr=2e-3", "logging.interval_steps=3"])
    with pytest.raises(RunFolderError) as caught:
        folder.claim(other)
    assert caught.value.exit_code == 8
    assert caught.value.problem.splitlines() == [
        f"{folder.path} belongs to another recipe; it differs in",
        f"    optimizer.lr: {recipe.optimizer.lr} -> 0.002",
        f"    seed: {recipe.seed} -> 7",
    ]
    assert "--runs-dir DIR" in caught.value.action
    assert (folder.path / "recipe.resolved.yaml").read_bytes() == before
    assert not folder.is_claimed


def test_damaged_resolved_recipe_is_reported(folder: RunFolder, recipe: Recipe) -> None:
    folder.claim(recipe)
    (folder.path / "metrics.jsonl").touch()
    folder.release()
    path = folder.path / "recipe.resolved.yaml"
    for content, fault in ((b"name: [", "line 1"), (b"\xff", "can't decode byte"), (b"", "not a mapping")):
        path.write_bytes(content)
        with pytest.raises(
            RunFolderError, match=rf"recipe of this run is damaged: .*recipe\.resolved\.yaml.*{fault}"
        ) as caught:
            folder.claim(recipe)
        assert "--fresh" in caught.value.action
        assert not folder.is_claimed


@pytest.fixture
def holder(folder: RunFolder) -> Iterator[RunFolder]:
    """Another lock of the folder, as another process holds it."""
    made = RunFolder(folder.path)
    made.lock()
    yield made
    made.release()


def test_claim_refuses_a_locked_folder(folder: RunFolder, holder: RunFolder, recipe: Recipe) -> None:
    with pytest.raises(FolderBusyError) as caught:
        folder.claim(recipe)
    assert not folder.is_claimed
    assert caught.value.problem == f"another process is writing to {folder.path}"
    assert "name=OTHER" in caught.value.action
    holder.release()
    folder.claim(recipe)


def test_claim_below_a_file_is_a_storage_error(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(StorageError, match="cannot be written: Not a directory") as caught:
        RunFolder(tmp_path / "runs" / "quickstart").claim(recipe)
    assert "choose a folder that you may write to" in caught.value.action


def test_claim_in_a_read_only_folder_is_a_storage_error(
    folder: RunFolder, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: int) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match=r"\.lock cannot be written: Permission denied"):
        folder.claim(recipe)


def test_has_finished_needs_status_figures_and_an_intact_export(folder: RunFolder, recipe: Recipe) -> None:
    folder.claim(recipe)
    folder.export.mkdir()
    weights = folder.export / "model.safetensors"
    weights.write_bytes(bytes(8))
    manifest = {"recipe_fingerprint": recipe.fingerprint, "files": {"model.safetensors": {"bytes": 8}}}
    (folder.export / "manifest.json").write_text(json.dumps(manifest))
    write_status(folder.path, "finished")
    assert not folder.has_finished(recipe), "run.json is missing"
    (folder.path / "run.json").write_text("{}")
    assert folder.has_finished(recipe)
    assert not folder.has_finished(load_recipe("quickstart", ["seed=7"]))
    assert finished_before(folder.path) == f"quickstart: finished before; see {folder.path / 'report' / 'report.md'}"
    write_status(folder.path, "running")
    assert not folder.has_finished(recipe)
    write_status(folder.path, "finished")
    weights.write_bytes(bytes(7))
    assert not folder.has_finished(recipe)
    (folder.export / "manifest.json").unlink()
    assert not folder.has_finished(recipe)


def test_set_aside_renames_and_unlocks_the_folder(folder: RunFolder, recipe: Recipe) -> None:
    assert folder.set_aside() is None
    folder.claim(recipe)
    (folder.checkpoints / "step-00000004").mkdir()
    folder.release()
    aside = folder.set_aside()
    assert aside is not None
    assert re.fullmatch(r"quickstart\.before-\d{8}T\d{6}Z", aside.name)
    assert (aside / "checkpoints" / "step-00000004").is_dir()
    assert not folder.path.exists()
    assert not folder.is_claimed
    folder.claim(load_recipe("quickstart", ["seed=7"]))  # free again


def test_set_aside_keeps_all_runs_of_one_second(folder: RunFolder, recipe: Recipe) -> None:
    kept: set[str] = set()
    for _ in range(3):
        folder.claim(recipe)
        folder.release()
        aside = folder.set_aside()
        assert aside is not None
        kept.add(aside.name)
    assert {path.name for path in folder.path.parent.iterdir()} == kept
    assert len(kept) == 3


@pytest.mark.usefixtures("holder")
def test_set_aside_refuses_a_locked_folder(folder: RunFolder) -> None:
    with pytest.raises(FolderBusyError, match="another process is writing to"):
        folder.set_aside()
    assert [path.name for path in folder.path.parent.iterdir()] == ["quickstart"]


def test_lock_of_a_folder_that_is_renamed_meanwhile_is_repeated(
    folder: RunFolder, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.claim(recipe)
    folder.release()
    real = fcntl.flock
    moved = folder.path.with_name("moved")

    def flock(descriptor: int, operation: int) -> None:
        if not moved.exists():
            folder.path.rename(moved)  # between opening and locking
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    folder.lock()
    with pytest.raises(FolderBusyError):
        RunFolder(folder.path).lock()
    RunFolder(moved).lock()  # the renamed folder is free


def test_claimed_folder_is_not_world_writable_under_any_umask(folder: RunFolder, recipe: Recipe) -> None:
    before = os.umask(0)
    try:
        folder.claim(recipe)
    finally:
        os.umask(before)
    assert folder.checkpoints.stat().st_mode & 0o002 == 0
