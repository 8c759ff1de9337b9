import ctypes
import errno
import itertools
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from inheritune_ds.checkpoints import shard_writer
from inheritune_ds.checkpoints.shard_writer import require_space, write_shard
from inheritune_ds.errors import StorageError
from inheritune_ds.storage.files import blake3_file

WEIGHTS = torch.arange(3000.0).reshape(30, 100)
STATE = {"weights": WEIGHTS, "step": 7, "moments": [torch.ones(500), torch.zeros(0)]}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a few kilobytes go through everything that gigabytes go through."""
    for name, size in (("_PIECE_BYTES", 512), ("_INLINE_BYTES", 100)):
        monkeypatch.setattr(shard_writer, name, size)


def check(path: Path, entry: dict[str, Any]) -> None:
    assert entry == {"bytes": path.stat().st_size, "blake3": blake3_file(path)}
    loaded = torch.load(path, weights_only=True)
    assert loaded["step"] == 7
    assert torch.equal(loaded["weights"], WEIGHTS)
    assert [value.tolist() for value in loaded["moments"]] == [[1.0] * 500, []]


def test_a_shard_is_what_torch_loads_and_the_hash_is_that_of_the_file(tmp_path: Path) -> None:
    check(tmp_path / "one.pt", write_shard(STATE, tmp_path / "one.pt", needed_bytes=0))


@pytest.mark.usefixtures("small_pieces")
def test_pieces_and_threads_change_nothing_and_the_disk_begins_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[int, int]] = []
    real = shard_writer._begin_writing

    def noted(descriptor: int, offset: int, count: int) -> object:
        begun.append((offset, count))
        return real(descriptor, offset, count)

    monkeypatch.setattr(shard_writer, "_begin_writing", noted)
    entry = write_shard(STATE, tmp_path / "one.pt", needed_bytes=0)
    check(tmp_path / "one.pt", entry)
    assert sum(count for _, count in begun) > 0.8 * entry["bytes"]
    assert all(one + count <= other for (one, count), (other, _) in itertools.pairwise(begun))


@pytest.mark.skipif(sys.platform != "linux", reason="a call of Linux")
def test_the_disk_is_asked_to_begin(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.write(bytes(10_000))
        file.flush()
        assert shard_writer._begin_writing(file.fileno(), 0, 10_000) == 0


def test_a_c_library_without_the_call_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert shard_writer._find_begin_writing()(0, 0, 1) is None


@pytest.mark.usefixtures("small_pieces")
def test_a_short_write_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda number, data: real(number, data[: max(1, len(data) // 3)]))
    check(tmp_path / "one.pt", write_shard(STATE, tmp_path / "one.pt", needed_bytes=0))


def test_torch_computes_its_checksums_again_afterwards(tmp_path: Path) -> None:
    write_shard(STATE, tmp_path / "one.pt", needed_bytes=0)
    assert torch.serialization.get_crc32_options() is True


def test_others_cannot_write_to_a_shard_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_shard(STATE, tmp_path / "one.pt", needed_bytes=0)
    finally:
        os.umask(before)
    assert (tmp_path / "one.pt").stat().st_mode & 0o777 == 0o644


def refusing_at(call: int, number: int, real: Callable[..., Any]) -> Callable[..., Any]:
    calls = iter(range(10**6))

    def refuse(*arguments: Any) -> Any:
        if next(calls) == call:
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    return refuse


@pytest.mark.usefixtures("small_pieces")
def test_a_refusal_at_any_write_is_told_with_path_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, told = os.write, []
    for call in range(1000):
        path = tmp_path / f"{call}.pt"
        monkeypatch.setattr(os, "write", refusing_at(call, errno.ENOSPC, real))
        try:
            check(path, write_shard(STATE, path, needed_bytes=123456))
            break
        except StorageError as error:
            told.append((error.problem, error.action))
    assert len(told) > 30
    action = "free some space, then give the same command again: older checkpoints are kept"
    for number, found in enumerate(told):
        path = tmp_path / f"{number}.pt"
        problem = f"{path} cannot be written: No space left on device; the checkpoint takes 123,456 bytes"
        assert found == (problem, action)


@pytest.mark.parametrize("call", ["write", "fsync", "open"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EFBIG])
@pytest.mark.usefixtures("small_pieces")
def test_every_call_s_refusal_is_told(call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, call, refusing_at(0, number, getattr(os, call)))
    with pytest.raises(StorageError) as caught:
        write_shard(STATE, tmp_path / "one.pt", needed_bytes=9)
    assert caught.value.problem == (
        f"{tmp_path / 'one.pt'} cannot be written: {os.strerror(number)}; the checkpoint takes 9 bytes"
    )


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "one.pt").touch()
    with pytest.raises(StorageError, match=r"one\.pt cannot be written: File exists"):
        write_shard(STATE, tmp_path / "one.pt", needed_bytes=0)


def test_there_must_be_room_for_so_many_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> Any:
        asked.append(path)
        return shutil._ntuple_diskusage(10_000, 8_001, 1999)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    folder = tmp_path / "run" / "checkpoints"
    require_space(folder, 999, count=2)
    require_space(folder, 1999, count=1)
    with pytest.raises(StorageError) as caught:
        require_space(folder, 1000, count=2)
    assert asked == [tmp_path] * 3
    assert str(caught.value) == (
        f"{folder} has 1,999 bytes free, and 2 checkpoints of 1,000 bytes take 2,000\n"
        "  do: free some space, or keep fewer checkpoints (checkpoint.keep)"
    )
