"""Hashes are remembered, and only as long as the file is the same."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from inheritune_ds.storage import known_hashes as module
from inheritune_ds.storage.files import sha256_file
from inheritune_ds.storage.known_hashes import known_hashes


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a test are young."""
    monkeypatch.setattr(module, "_SETTLED_NS", -1)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read."""
    read: list[Path] = []

    def watched(path: Path, advance: Callable[[int], None]) -> str:
        read.append(path)
        return sha256_file(path, advance)

    monkeypatch.setattr(module, "sha256_file", watched)
    return read


def sha256(folder: Path, path: Path) -> str:
    counted: list[int] = []
    with known_hashes(folder) as hashes:
        digest = hashes.sha256(path, counted.append)
    assert sum(counted) == path.stat().st_size
    return digest


def test_a_file_is_read_once_by_all_launches(tmp_path: Path, hashed: list[Path]) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"content")
    for _ in range(3):
        assert sha256(tmp_path / "cache", path) == hashlib.sha256(b"content").hexdigest()
    assert hashed == [path]
    (tmp_path / "b.txt").write_bytes(b"other")
    sha256(tmp_path / "cache", tmp_path / "b.txt")
    sha256(tmp_path / "cache", path)  # adding a file keeps the others
    assert hashed == [path, tmp_path / "b.txt"]


def overwrite(path: Path) -> None:
    """Other bytes of the same size and modification time in the same file."""
    before = path.stat()
    path.write_bytes(b"CONTENT")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    path.with_name("new").write_bytes(b"CONTENT")
    path.with_name("new").replace(path)


@pytest.mark.parametrize("change", [overwrite, replace, lambda path: path.write_bytes(b"longer content")])
def test_a_changed_file_is_read_again(tmp_path: Path, change: Callable[[Path], object]) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"content")
    sha256(tmp_path, path)
    change(path)
    assert sha256(tmp_path, path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_young_file_is_not_remembered(tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SETTLED_NS", 3600 * 10**9)
    path = tmp_path / "a.txt"
    path.write_bytes(b"content")
    sha256(tmp_path, path)
    sha256(tmp_path, path)
    assert hashed == [path, path]
    assert not (tmp_path / "hashes.json").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"x": 1}', '{"PATH": "text"}'])
def test_a_damaged_memory_is_ignored(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"content")
    (tmp_path / "hashes.json").write_text(content.replace("PATH", str(path.resolve())))
    assert sha256(tmp_path, path) == hashlib.sha256(b"content").hexdigest()


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"content")
    assert sha256(path / "cache", path) == hashlib.sha256(b"content").hexdigest()
