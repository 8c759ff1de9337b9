"""The manifest, and every fault of the files that it lists."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3

from inheritune_ds.checkpoints import manifest as checkpoint_manifest
from inheritune_ds.checkpoints.manifest import (
    MANIFEST,
    find_fault,
    manifest_text,
    newest_step,
    published,
    read_manifest,
)
from inheritune_ds.checkpoints.retention import expired
from inheritune_ds.checkpoints.store import CheckpointStore
from inheritune_ds.errors import CheckpointError
from tests.checkpoints.saved import MODEL, flip, newest, save
from tests.conftest import Logged


def test_published_lists_the_newest_first(store: CheckpointStore, folder: Path) -> None:
    assert (list(published(folder)), newest_step(folder)) == ([], 0)
    save(store, 90, 1000, 100)
    (folder / "step-3").mkdir()
    assert [path.name for path in published(folder)] == ["step-00001000", "step-00000100", "step-00000090"]
    assert newest_step(folder) == 1000


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def link(path: Path) -> None:
    path.rename(path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


def link_folder(path: Path) -> None:
    (path.parents[2] / "elsewhere").mkdir()
    (path.parent / "more").symlink_to(path.parents[2] / "elsewhere")


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def add_shard(path: Path) -> None:
    shutil.copy(path, path.with_name("rank-00002.safetensors"))


HARMS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (Path.unlink, "rank-00001.safetensors is missing"),
    "short": (shorten, "rank-00001.safetensors has 255 bytes instead of 256"),
    "flipped": (flip, "rank-00001.safetensors has blake3 {found}... instead of {expected}..."),
    "link": (link, "rank-00001.safetensors is a symbolic link and may point outside the checkpoint"),
    "folder link": (link_folder, "more is a symbolic link and may point outside the checkpoint"),
    "pipe": (replace_by_fifo, "rank-00001.safetensors has -1 bytes instead of 256"),
    "extra shard": (add_shard, "rank-00002.safetensors is not in manifest.json"),
    "no manifest": (
        lambda path: (path.parent / MANIFEST).unlink(),
        "manifest.json is missing or not as it was written",
    ),
    "world-writable": (lambda path: path.chmod(0o666), "rank-00001.safetensors can be written by any user (mode 666)"),
}


@pytest.mark.parametrize("name", HARMS)
def test_damaged_checkpoint_is_skipped_with_a_warning(
    name: str, store: CheckpointStore, folder: Path, logged: Logged
) -> None:
    save(store, 1, 2)
    harm, fault = HARMS[name]
    harm(folder / "step-00000002" / "rank-00001.safetensors")
    assert newest(store) == folder / "step-00000001"
    changed = bytearray(MODEL)
    changed[128] ^= 1
    problem = fault.format(found=blake3(changed).hexdigest()[:12], expected=blake3(MODEL).hexdigest()[:12])
    assert logged() == [f"WARNING: checkpoint {folder / 'step-00000002'} is skipped: {problem}"]


def test_flipped_bits_of_a_manifest_are_found(store: CheckpointStore) -> None:
    saved = save(store, 2)
    manifest = saved / MANIFEST
    whole = manifest.read_bytes()
    for number in range(0, len(whole) * 8, 11):  # each bit of a byte in turn, over the whole file
        content = bytearray(whole)
        content[number // 8] ^= 1 << (number % 8)
        manifest.write_bytes(content)
        assert read_manifest(saved) is None, number
    manifest.write_bytes(whole)
    assert find_fault(saved) is None


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"files": 3}', '{"files": {}}', "NaN", "\N{SNOWMAN}"])
def test_invalid_manifest_is_a_fault(text: str, store: CheckpointStore) -> None:
    saved = save(store, 2)
    (saved / MANIFEST).write_text(text, encoding="utf-8")
    assert find_fault(saved) == "manifest.json is missing or not as it was written"


def test_another_spelling_of_a_float_is_a_changed_manifest(store: CheckpointStore) -> None:
    manifest = save(store, 2) / MANIFEST
    text = manifest.read_text()
    changed = text.replace("2.1", "2.10")
    assert changed != text
    assert json.loads(changed) == json.loads(text)
    manifest.write_text(changed)
    assert read_manifest(manifest.parent) is None


@pytest.mark.parametrize(
    ("name", "fault"), [(MANIFEST, "manifest.json is missing or not as it was written"), (".", "it is a symbolic link")]
)
def test_link_instead_of_a_manifest_or_folder_is_a_fault(
    name: str, fault: str, store: CheckpointStore, tmp_path: Path
) -> None:
    saved = save(store, 2)
    path = saved / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert find_fault(saved) == fault


def test_checkpoint_under_another_step_s_name_is_a_fault(store: CheckpointStore, folder: Path) -> None:
    save(store, 2).rename(folder / "step-00000009")
    assert find_fault(folder / "step-00000009") == "manifest.json is that of step 2"


@pytest.mark.parametrize("name", ["/etc/hostname", "../outside", "more/../../outside"])
def test_path_outside_the_folder_is_a_fault(name: str, store: CheckpointStore) -> None:
    saved = save(store, 2)
    manifest = read_manifest(saved)
    assert manifest is not None
    manifest["files"][name] = manifest["files"].pop("rank-00001.safetensors")
    (saved / MANIFEST).write_text(manifest_text(manifest))
    assert find_fault(saved) == f"{name} is outside the checkpoint"


def test_unreadable_file_is_a_fault(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save(store, 2)

    def broken(path: Path, _advance: object) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(checkpoint_manifest, "blake3_file", broken)
    assert find_fault(saved) == f"{saved / 'rank-00000.safetensors'} cannot be read: Input/output error"


def test_earlier_format_is_refused_with_the_commit_that_reads_it(
    store: CheckpointStore, folder: Path, logged: Logged
) -> None:
    saved = save(store, 2, 4)
    manifest = read_manifest(saved)
    assert manifest is not None
    del manifest["format"]
    (saved / MANIFEST).write_text(manifest_text(manifest))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError) as caught:
        newest(store)
    assert caught.value.problem == (
        f"{saved} cannot be loaded: it is of the format before this one; commit 318409b is the last that reads it"
    )
    assert "--fresh, which renames the old run folder" in caught.value.action
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    with pytest.raises(CheckpointError, match="commit 318409b is the last that reads it"):
        expired(CheckpointStore(folder, keep=1))
    assert logged() == []


def test_every_hashed_byte_is_counted(store: CheckpointStore) -> None:
    counted: list[int] = []
    assert find_fault(save(store, 2), counted.append) is None
    assert sum(counted) == len(MODEL) + len("state of 2")
