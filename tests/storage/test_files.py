import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file

from inheritune_ds.errors import CorpusError, StorageError
from inheritune_ds.storage.files import (
    CHUNK_BYTES,
    blake3_file,
    read_json,
    sha256_file,
    storage_errors,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_hashes_cover_the_whole_file(size: int, tmp_path: Path) -> None:
    content = bytes(range(251)) * (size // 251 + 1)
    path = tmp_path / "file"
    path.write_bytes(content[:size])
    assert sha256_file(path) == hashlib.sha256(content[:size]).hexdigest()
    assert blake3_file(path) == blake3(content[:size]).hexdigest()


def test_blake3_matches_the_published_test_vector(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"\0")  # test_vectors.json of BLAKE3-team/BLAKE3, length 1
    assert blake3_file(tmp_path / "one") == "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213"


def test_write_text_replaces_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    for text in ("one", "two: \N{GREEK SMALL LETTER BETA}\n", ""):
        write_text(path, text)
        assert path.read_bytes() == text.encode()
        assert names(tmp_path) == ["note.txt"]


def test_write_text_keeps_the_old_text_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "note.txt"
    write_text(path, "old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError) as caught:
        write_text(path, "new")
    assert caught.value.problem == f"{path} cannot be written: No space left on device"
    assert caught.value.action.startswith("free some space")
    assert caught.value.exit_code == 5
    assert path.read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["note.txt"]


def test_write_text_syncs_before_it_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    replace = Path.replace

    def replacing(path: Path, target: Path) -> Path:
        order.append("replace")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", lambda _: order.append("fsync"))
    monkeypatch.setattr(Path, "replace", replacing)
    write_text(tmp_path / "note.txt", "text")
    assert order == ["fsync", "replace"]
    assert names(tmp_path) == ["note.txt"]


def test_writing_below_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    inside = tmp_path / "file" / "inside"
    with pytest.raises(StorageError, match=r"cannot be written: Not a directory") as caught:
        write_json(inside, {})
    assert str(tmp_path / "file") in caught.value.problem
    assert caught.value.action == "choose a folder that you may write to; the command's --help names its options"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO])
def test_storage_errors_name_the_file_that_was_refused(number: int, tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught, storage_errors(tmp_path):
        raise OSError(number, os.strerror(number), "/some/file")
    assert caught.value.problem == f"/some/file cannot be written: {os.strerror(number)}"
    with pytest.raises(StorageError) as caught, storage_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    assert caught.value.problem.startswith(f"{tmp_path} cannot be written")
    assert caught.value.__suppress_context__


def test_storage_errors_pass_other_errors_on(tmp_path: Path) -> None:
    with pytest.raises(KeyError), storage_errors(tmp_path):
        raise KeyError("x")
    with pytest.raises(CorpusError, match="its own words"), storage_errors(tmp_path):
        raise CorpusError("its own words (os error 28)")


def test_storage_errors_recognize_a_refusal_in_a_rust_library_s_error(
    tmp_path: Path, room: Callable[[int], None]
) -> None:
    with pytest.raises(StorageError) as caught, storage_errors(tmp_path):
        raise ValueError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert caught.value.problem == f"{tmp_path} cannot be written: No space left on device"
    assert caught.value.action == "free some space, then rerun the same command"
    path = tmp_path / "large.safetensors"
    room(1000)
    with pytest.raises(StorageError) as caught, storage_errors(path):
        save_file({"x": torch.zeros(1000)}, path)
    assert caught.value.problem == f"{path} cannot be written: File too large"


def test_write_json_is_read_back_equal(tmp_path: Path) -> None:
    document: dict[str, Any] = {"b": [1, 2.5, None], "a": {"text": "\N{SNOWMAN}"}, "f": 0.1}
    write_json(tmp_path / "d.json", document)
    assert read_json(tmp_path / "d.json") == document
    assert (tmp_path / "d.json").read_text(encoding="utf-8").endswith("}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_write_json_refuses_numbers_that_json_lacks(value: float, tmp_path: Path) -> None:
    write_json(tmp_path / "d.json", {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "d.json", {"x": value})
    assert read_json(tmp_path / "d.json") == {"x": 1}
    assert names(tmp_path) == ["d.json"]


@pytest.mark.parametrize("content", [b'{"cut": ', b"", b"\xff\xfe"])
def test_read_json_returns_none_for_a_damaged_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "d.json").write_bytes(content)
    assert read_json(tmp_path / "d.json") is None
    assert read_json(tmp_path / "missing.json") is None
    assert read_json(tmp_path) is None
