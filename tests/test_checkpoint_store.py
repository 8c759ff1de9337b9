import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inheritune_ds import checkpoint_manifest
from inheritune_ds.checkpoint_manifest import manifest_text
from inheritune_ds.checkpoint_store import (
    GENERATION,
    MANIFEST,
    POINTER,
    CheckpointStore,
    find_fault,
    newest_step,
    published,
    read_manifest,
)
from inheritune_ds.errors import CheckpointError, StorageError
from inheritune_ds.recipe import Checkpointing

MODEL = bytes(range(256))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def store(folder: Path) -> CheckpointStore:
    return CheckpointStore(folder, keep=3)


def written(temporary: Path, text: str) -> dict[str, Any]:
    """Write a rank's share; the description of the files."""
    files = {"engine/rank0.pt": text.encode(), "engine/model.pt": MODEL}
    (temporary / "engine").mkdir()
    for name, content in files.items():
        (temporary / name).write_bytes(content)
    return {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }


def save(store: CheckpointStore, *steps: int, text: str = "state") -> Path:
    for step in steps:
        temporary = store.begin(step)
        fields = {"state": {"step": step, "seconds": 0.1 + step}}
        last = store.publish(temporary, step, fields, written(temporary, f"{text} of {step}"), print)
    return last


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_published_checkpoint_is_whole_and_pointed_at(store: CheckpointStore, folder: Path, lines: list[str]) -> None:
    assert store.newest_verified(lines.append) is None
    assert store.claim_generation() == 1
    saved = save(store, 7)
    assert names(folder) == ["generation", "latest", "step-00000007"]
    assert (folder / POINTER).read_text() == "step-00000007\n"
    assert store.newest_verified(lines.append) == saved
    assert lines == []
    manifest = read_manifest(saved)
    assert manifest is not None
    assert (manifest["step"], manifest["generation"], manifest["state"]) == (7, 1, {"step": 7, "seconds": 7.1})
    assert manifest["files"]["engine/model.pt"] == {"bytes": 256, "sha256": hashlib.sha256(MODEL).hexdigest()}


def test_steps_are_listed_from_the_newest(store: CheckpointStore, folder: Path) -> None:
    assert (list(published(folder)), newest_step(folder)) == ([], 0)
    save(store, 90, 1000, 100)
    (folder / "step-3").mkdir()
    assert [path.name for path in published(folder)] == ["step-00001000", "step-00000100", "step-00000090"]
    assert newest_step(folder) == 1000


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def link(path: Path) -> None:
    path.rename(path.parents[3] / "elsewhere")
    path.symlink_to(path.parents[3] / "elsewhere")


def link_folder(path: Path) -> None:
    path.parent.rename(path.parents[3] / "elsewhere")
    path.parent.symlink_to(path.parents[3] / "elsewhere")


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def add_shard(path: Path) -> None:
    shutil.copy(path, path.with_name("rank1.pt"))


def lose_manifest(path: Path) -> None:
    (path.parents[1] / MANIFEST).unlink()


def open_to_all(path: Path) -> None:
    path.chmod(0o666)


HARMS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (Path.unlink, "engine/model.pt is missing"),
    "short": (shorten, "engine/model.pt has 255 bytes instead of 256"),
    "flipped": (flip, "engine/model.pt has sha256 {found}... instead of {expected}..."),
    "link": (link, "engine/model.pt is a symbolic link and may lie outside the checkpoint"),
    "folder link": (link_folder, "engine is a symbolic link and may lie outside the checkpoint"),
    "pipe": (replace_by_fifo, "engine/model.pt has -1 bytes instead of 256"),
    "extra shard": (add_shard, "engine/rank1.pt is not in manifest.json"),
    "no manifest": (lose_manifest, "manifest.json is missing or not as it was written"),
    "open to all": (open_to_all, "engine/model.pt can be written by everybody (mode 666)"),
}


@pytest.mark.parametrize("name", HARMS)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    name: str, store: CheckpointStore, folder: Path, lines: list[str]
) -> None:
    save(store, 1, 2)
    harm, fault = HARMS[name]
    harm(folder / "step-00000002" / "engine" / "model.pt")
    assert store.newest_verified(lines.append) == folder / "step-00000001"
    changed = bytearray(MODEL)
    changed[128] ^= 1
    told = fault.format(found=hashlib.sha256(changed).hexdigest()[:12], expected=hashlib.sha256(MODEL).hexdigest()[:12])
    assert lines == [f"WARNING: checkpoint {folder / 'step-00000002'} is passed over: {told}"]


def test_flipped_bits_of_a_manifest_are_found(store: CheckpointStore) -> None:
    saved = save(store, 2)
    manifest = saved / MANIFEST
    whole = manifest.read_bytes()
    for number in range(0, len(whole) * 8, 11):  # every bit of a byte in turn, all over the file
        content = bytearray(whole)
        content[number // 8] ^= 1 << (number % 8)
        manifest.write_bytes(content)
        assert read_manifest(saved) is None, number
    manifest.write_bytes(whole)
    assert find_fault(saved) is None


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"files": 3}', '{"files": {}}', "NaN", "\N{SNOWMAN}"])
def test_what_is_no_manifest_is_not_believed(text: str, store: CheckpointStore) -> None:
    saved = save(store, 2)
    (saved / MANIFEST).write_text(text, encoding="utf-8")
    assert find_fault(saved) == "manifest.json is missing or not as it was written"


def test_a_float_that_means_the_same_is_a_changed_manifest(store: CheckpointStore) -> None:
    manifest = save(store, 2) / MANIFEST
    text = manifest.read_text()
    changed = text.replace("2.1", "2.10")
    assert changed != text
    assert json.loads(changed) == json.loads(text)
    manifest.write_text(changed)
    assert read_manifest(manifest.parent) is None


def test_a_manifest_that_is_a_link_is_not_believed(store: CheckpointStore, tmp_path: Path) -> None:
    manifest = save(store, 2) / MANIFEST
    manifest.rename(tmp_path / "manifest")
    manifest.symlink_to(tmp_path / "manifest")
    assert find_fault(manifest.parent) == "manifest.json is missing or not as it was written"


def test_a_checkpoint_that_is_a_link_is_not_believed(store: CheckpointStore, tmp_path: Path) -> None:
    saved = save(store, 2)
    saved.rename(tmp_path / "step-00000002")
    saved.symlink_to(tmp_path / "step-00000002")
    assert find_fault(saved) == "it is a symbolic link"


def test_a_checkpoint_under_another_step_s_name_is_found(store: CheckpointStore, folder: Path) -> None:
    save(store, 2).rename(folder / "step-00000009")
    assert find_fault(folder / "step-00000009") == "manifest.json is that of step 2"


@pytest.mark.parametrize("name", ["/etc/hostname", "../outside", "engine/../../outside"])
def test_no_name_leads_out_of_the_folder(name: str, store: CheckpointStore) -> None:
    saved = save(store, 2)
    manifest = read_manifest(saved)
    assert manifest is not None
    manifest["files"][name] = manifest["files"].pop("engine/model.pt")
    (saved / MANIFEST).write_text(manifest_text(manifest))
    assert find_fault(saved) == f"{name} lies outside the checkpoint"


def test_a_file_that_cannot_be_read_is_a_fault(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save(store, 2)

    def broken(path: Path, _advance: object) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(checkpoint_manifest, "sha256_file", broken)
    assert find_fault(saved) == f"{saved / 'engine' / 'rank0.pt'} cannot be read: Input/output error"


def test_every_byte_that_is_read_is_told(store: CheckpointStore) -> None:
    told: list[int] = []
    assert find_fault(save(store, 2), told.append) is None
    assert sum(told) == len(MODEL) + len("state of 2")


def test_files_of_somebody_else_are_not_loaded(
    store: CheckpointStore, folder: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = save(store, 2)
    me = os.geteuid()
    assert find_fault(saved) is None
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    assert find_fault(saved) == f"its folder belongs to user {me}, not to you ({me + 1})"
    with pytest.raises(CheckpointError) as caught:
        store.newest_verified(lines.append)
    assert caught.value.problem == (
        f"{folder} belongs to user {me}, not to you ({me + 1}); "
        "DeepSpeed's files are pickle, which can run code when it is loaded"
    )
    assert "copy it as yourself if you trust" in caught.value.action
    with pytest.raises(CheckpointError, match="belongs to user"):
        CheckpointStore(folder, keep=3).claim_generation()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a file away")
def test_one_file_of_somebody_else_is_enough(store: CheckpointStore) -> None:
    saved = save(store, 2)
    os.chown(saved / "engine" / "model.pt", 65534, -1)
    assert find_fault(saved) == "engine/model.pt belongs to user 65534, not to you (0)"


def test_a_folder_open_to_all_is_refused(store: CheckpointStore, folder: Path, lines: list[str]) -> None:
    save(store, 2)
    folder.chmod(0o777)
    with pytest.raises(CheckpointError) as caught:
        store.newest_verified(lines.append)
    assert caught.value.problem.startswith(f"{folder} can be written by everybody (mode 777)")
    assert f"chmod o-w {folder}" in caught.value.action


def test_what_is_saved_under_an_open_umask_is_closed(store: CheckpointStore, folder: Path, lines: list[str]) -> None:
    before = os.umask(0)
    try:
        saved = save(store, 2)
    finally:
        os.umask(before)
    assert store.newest_verified(lines.append) == saved
    assert not any(path.stat().st_mode & stat.S_IWOTH for path in [folder, saved, *saved.rglob("*")])


def test_no_intact_checkpoint_is_an_error_that_names_each(
    store: CheckpointStore, folder: Path, lines: list[str]
) -> None:
    save(store, 1, 2)
    (folder / "step-00000001" / "engine" / "rank0.pt").unlink()
    (folder / "step-00000002" / MANIFEST).unlink()
    with pytest.raises(CheckpointError) as caught:
        store.newest_verified(lines.append)
    assert caught.value.exit_code == 4
    assert caught.value.problem == (
        f"no checkpoint in {folder} can be used: step-00000002: manifest.json is missing or not as it was written; "
        "step-00000001: engine/rank0.pt is missing"
    )
    assert f"`inheritune-ds checkpoints {folder.parent} verify`" in caught.value.action
    assert "--fresh" in caught.value.action
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("trace", "told"),
    [
        ({"checkpoints/latest": ""}, "latest is there, so this run has saved before"),
        ({"status.json": '{"step": 8}'}, "status.json tells that step 8 was saved"),
        ({"status.json": '{"step": 0, "saved_step": 12}'}, "status.json tells that step 12 was saved"),
    ],
)
def test_a_run_whose_checkpoints_have_gone_does_not_start_over(
    trace: dict[str, str], told: str, store: CheckpointStore, folder: Path, lines: list[str]
) -> None:
    folder.mkdir(parents=True)
    for name, text in trace.items():
        (folder.parent / name).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        store.newest_verified(lines.append)
    assert caught.value.problem == f"{folder} holds no checkpoint any more, but {told}"
    assert "--fresh" in caught.value.action


@pytest.mark.parametrize("status", [None, '{"step": 0, "saved_step": 0}', "[]", "{"])
def test_a_run_that_never_saved_starts_from_nothing(
    status: str | None, store: CheckpointStore, folder: Path, lines: list[str]
) -> None:
    store.claim_generation()
    (folder.parent / "metrics.jsonl").touch()
    if status is not None:
        (folder.parent / "status.json").write_text(status)
    assert store.newest_verified(lines.append) is None
    assert lines == []


def absent(pointer: Path) -> None:
    pointer.unlink()


def a_folder(pointer: Path) -> None:
    pointer.unlink()
    pointer.mkdir()


POINTERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (absent, "is missing"),
    "empty": (lambda pointer: pointer.write_text(""), "is empty"),
    "garbage": (lambda pointer: pointer.write_bytes(b"\x00\xff\xfe"), "is no text"),
    "text": (lambda pointer: pointer.write_text("global_step6"), "holds 'global_step6', which is no checkpoint's name"),
    "outside": (lambda pointer: pointer.write_text("../x"), "holds '../x', which is no checkpoint's name"),
    "absent tag": (lambda pointer: pointer.write_text("step-00000099\n"), "names step-00000099, which is not there"),
    "unreadable": (a_folder, "cannot be read (Is a directory)"),
}


@pytest.mark.parametrize("name", POINTERS)
def test_the_pointer_is_not_needed(name: str, store: CheckpointStore, folder: Path, lines: list[str]) -> None:
    saved = save(store, 1, 2)
    harm, told = POINTERS[name]
    harm(folder / POINTER)
    assert store.newest_verified(lines.append) == saved
    assert lines == [f"WARNING: {folder / POINTER} {told}; the newest intact checkpoint is used without it"]


def test_a_folder_in_the_pointer_s_place_is_left_there(store: CheckpointStore, folder: Path, lines: list[str]) -> None:
    (folder / POINTER / "mine").mkdir(parents=True)
    saved = save(store, 1, 2)
    assert store.newest_verified(lines.append) == saved
    assert (folder / POINTER / "mine").is_dir()


def test_an_unreadable_folder_is_an_error(
    store: CheckpointStore, folder: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, 1)

    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    for call in (store.newest, store.claim_generation, lambda: store.newest_verified(lines.append)):
        with pytest.raises(CheckpointError) as caught:
            call()
        assert caught.value.problem == f"the checkpoints in {folder} cannot be read: Permission denied: {folder}"


def test_only_the_newest_launch_publishes(store: CheckpointStore, folder: Path) -> None:
    assert store.claim_generation() == 1
    save(store, 4)
    begun = store.begin(8)
    later = CheckpointStore(folder, keep=3)
    assert later.claim_generation() == 2
    assert not begun.exists()  # nobody publishes what the earlier launch was writing
    with pytest.raises(CheckpointError) as caught:
        store.begin(8)
    assert caught.value.problem == f"another launch (number 2, this is 1) has taken over {folder}"
    begun.mkdir()
    with pytest.raises(CheckpointError, match="has taken over"):
        store.publish(begun, 8, {}, written(begun, "late"), print)
    assert [path.name for path in published(folder)] == ["step-00000004"]
    assert (folder / POINTER).read_text() == "step-00000004\n"
    save(later, 8)


def test_of_two_launches_with_one_number_the_last_publishes(store: CheckpointStore, folder: Path) -> None:
    store.claim_generation()
    (folder / GENERATION).write_text("1 of another launch")  # claimed at the same moment, where no lock works
    with pytest.raises(CheckpointError, match=r"another launch \(number 1, this is 1\) has taken over"):
        store.begin(4)


@pytest.mark.parametrize("text", ["", "garbage", None])
def test_a_lost_generation_is_counted_on_from_the_manifests(
    text: str | None, store: CheckpointStore, folder: Path
) -> None:
    save(store, 4)
    if text is None:
        (folder / GENERATION).unlink()
    else:
        (folder / GENERATION).write_text(text)
    save(store, 8)  # nobody has claimed after it
    (folder / GENERATION).unlink()
    assert CheckpointStore(folder, keep=3).claim_generation() == 2


def test_a_step_saved_again_replaces_the_first(store: CheckpointStore, folder: Path, lines: list[str]) -> None:
    save(store, 5)
    saved = save(store, 5, text="another state")
    assert (saved / "engine" / "rank0.pt").read_text() == "another state of 5"
    assert store.newest_verified(lines.append) == saved
    assert names(folder) == ["generation", "latest", "step-00000005"]


def test_a_refused_rename_leaves_the_one_of_the_same_step(
    store: CheckpointStore, folder: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
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
            store.publish(begun, 5, {}, files, print)
    store.discard(begun)
    assert store.newest_verified(lines.append) == older
    assert (older / "engine" / "rank0.pt").read_text() == "older of 5"
    assert names(folder) == ["generation", "latest", "step-00000005"]


class KilledError(BaseException):
    """Stands for SIGKILL: nothing that would tidy up afterwards works either."""


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
def test_a_kill_between_any_two_calls_leaves_the_old_or_the_new(
    step: int, store: CheckpointStore, folder: Path, lines: list[str], tmp_path: Path
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
        found = after.newest_verified(lines.append)
        assert found is not None, limit
        assert not any(name.startswith(".") for name in names(folder)), limit
        seen.append((found / "engine" / "rank0.pt").read_text())
        if ended:
            break
    assert ended, "100 calls are not enough"
    assert len(seen) > 15
    assert seen == sorted(seen, reverse=True), "the old one up to a moment, the new one from then on"
    assert set(seen) == {"old state of 5", f"new state of {step}"}
    assert lines == []


def test_a_full_disk_leaves_the_older_checkpoint(
    store: CheckpointStore, folder: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    older = save(store, 4)
    begun = store.begin(8)
    files = written(begun, "state of 8")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="cannot be written: No space left on device"):
            store.publish(begun, 8, {}, files, print)
    store.discard(begun)
    assert store.newest_verified(lines.append) == older
    assert names(folder) == ["generation", "latest", "step-00000004"]


def test_a_pointer_that_cannot_follow_is_told_and_the_checkpoint_counts(
    store: CheckpointStore, folder: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
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
        saved = store.publish(begun, 8, {}, files, lines.append)
    told = "WARNING: step 8 is saved, but latest does not name it: "
    assert lines == [f"{told}{folder / 'latest'} cannot be written: No space left on device"]
    lines.clear()
    assert store.newest_verified(lines.append) == saved
    assert lines == []  # it names a checkpoint that is there
    assert (folder / "latest").read_text() == "step-00000004\n"
    assert names(folder) == ["generation", "latest", "step-00000004", "step-00000008"]


def test_what_is_not_as_the_ranks_have_told_is_not_published(store: CheckpointStore, folder: Path) -> None:
    begun = store.begin(4)
    files = written(begun, "state")
    (begun / "engine" / "rank0.pt").write_text("stat")
    with pytest.raises(CheckpointError) as caught:
        store.publish(begun, 4, {}, files, print)
    assert caught.value.problem == (
        "the checkpoint of step 4 was not written as its ranks have told: engine/rank0.pt has 4 bytes instead of 5"
    )
    assert list(published(folder)) == []


@pytest.mark.skipif(sys.platform != "linux", reason="/proc names the open files")
def test_everything_is_on_the_disk_before_the_pointer_names_it(
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
    assert {"rank0.pt", "model.pt", "engine"} <= set(done[: done.index("rename to step-00000003")])
    pid = os.getpid()
    assert done[-5:] == [
        f".{MANIFEST}.{pid}.tmp",
        ".step-00000003.tmp",
        "rename to step-00000003",
        folder.name,
        f".{POINTER}.{pid}.tmp",
    ]


def test_the_newest_and_every_so_manieth_stay(folder: Path, lines: list[str]) -> None:
    store = CheckpointStore.of(folder, Checkpointing(interval_steps=10, keep=2, keep_every=3))
    for step in range(10, 101, 10):
        save(store, step)
        store.prune(lines.append)
    assert [path.name[-3:] for path in published(folder)] == ["100", "090", "060", "030"]
    assert list(store.staying().values()) == ["newest 2", "newest 2", "every 30 steps", "every 30 steps"]
    assert lines == []


def test_nothing_is_deleted_while_the_newest_is_damaged(folder: Path, lines: list[str]) -> None:
    store = CheckpointStore(folder, keep=1)
    save(store, 1, 2, 3)
    flip(folder / "step-00000003" / "engine" / "model.pt")
    assert store.prune(lines.append) == []
    assert len(list(published(folder))) == 3
    assert lines[0].startswith(f"WARNING: checkpoint {folder / 'step-00000003'} is damaged: engine/model.pt has sha256")
    assert lines[0].endswith("the older ones stay, however many there are")
    save(store, 4)
    assert [path.name for path in store.prune(lines.append)] == ["step-00000003", "step-00000002", "step-00000001"]


def test_a_folder_that_cannot_be_read_is_told_and_pruning_ends_nothing(
    store: CheckpointStore, folder: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, 1, 2, 3, 4)

    def refuse(_path: Path) -> Any:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refuse)
        assert store.prune(lines.append) == []
    assert lines == [f"WARNING: {folder} cannot be read: Input/output error; the older checkpoints stay"]
    assert [path.name for path in store.prune(lines.append)] == ["step-00000001"]


@pytest.mark.parametrize("call", ["rename", "rmdir"])
def test_what_cannot_be_deleted_is_told_and_left_to_the_next_launch(
    call: str, folder: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(folder, keep=1)
    save(store, 1, 2)

    def busy(path: Any, *_: Any, **__: Any) -> None:
        raise OSError(16, "Device or resource busy", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, busy)
        assert store.prune(lines.append) == []
    (line,) = lines
    assert line.startswith(f"checkpoint {folder / 'step-00000001'} cannot be deleted: Device or resource busy: ")
    assert line.endswith("; training goes on")
    store.claim_generation()
    store.prune(lines.append)
    assert names(folder) == ["generation", "latest", "step-00000002"]


def test_going_back_deletes_the_later_ones(store: CheckpointStore, folder: Path, lines: list[str]) -> None:
    save(store, 1, 2, 3, 4)
    assert [path.name for path in store.go_back(2, lines.append)] == ["step-00000004", "step-00000003"]
    assert (folder / POINTER).read_text() == "step-00000002\n"
    assert store.newest_verified(lines.append) == folder / "step-00000002"
    assert lines == []


def test_there_is_no_way_back_to_nothing(store: CheckpointStore, folder: Path, lines: list[str]) -> None:
    save(store, 2, 3)
    with pytest.raises(CheckpointError) as caught:
        store.go_back(1, lines.append)
    assert caught.value.problem == "the run cannot go back to step 1: no checkpoint is as early"
    flip(folder / "step-00000002" / "engine" / "model.pt")
    with pytest.raises(CheckpointError) as caught:
        store.go_back(2, lines.append)
    assert caught.value.problem.startswith("the run cannot go back to step 2: step-00000002: engine/model.pt has sha")
    assert len(list(published(folder))) == 2


def test_the_store_needs_no_torch() -> None:
    code = "import sys, inheritune_ds.checkpoint_store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
