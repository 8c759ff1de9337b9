"""Files of fragments: content, refusals of the disk, and coverage of every element."""

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from inheritune_ds.checkpoints.fragments import KINDS, MASTER, Fragments, check_coverage, file_name, key_of, write
from inheritune_ds.checkpoints.store import require_space
from inheritune_ds.errors import CheckpointError, StorageError, TrainingError
from inheritune_ds.storage import safetensors
from inheritune_ds.storage.files import blake3_file

FRAGMENTS = {"a.weight/fp32/0": torch.arange(3000.0), "a/b/exp_avg/7": torch.ones(500, dtype=torch.bfloat16)}


def check(path: Path, entry: Mapping[str, Any]) -> None:
    assert entry == {"bytes": path.stat().st_size, "blake3": blake3_file(path)}
    loaded = load_file(path)
    assert loaded.keys() == FRAGMENTS.keys()
    assert all(torch.equal(loaded[key], value) for key, value in FRAGMENTS.items())


def test_safetensors_loads_the_file_and_its_hash_matches(tmp_path: Path) -> None:
    check(tmp_path / "one", write(FRAGMENTS, tmp_path / "one", needed_bytes=0))


def test_rank_without_fragments_writes_an_empty_file(tmp_path: Path) -> None:
    write({}, tmp_path / file_name(0), needed_bytes=0)
    assert load_file(tmp_path / file_name(0)) == {}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a few kilobytes in as many pieces as gigabytes."""
    monkeypatch.setattr(safetensors, "_COPY_BYTES", 512)


@pytest.mark.usefixtures("small_pieces")
def test_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda number, data: real(number, data[: max(1, len(data) // 3)]))
    check(tmp_path / "one", write(FRAGMENTS, tmp_path / "one", needed_bytes=0))


def test_file_is_not_writable_by_others_under_any_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write(FRAGMENTS, tmp_path / "one", needed_bytes=0)
    finally:
        os.umask(before)
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o644


def refusing_at(call: int, number: int, real: Callable[..., Any]) -> Callable[..., Any]:
    calls = iter(range(10**6))

    def refuse(*arguments: Any) -> Any:
        if next(calls) == call:
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    return refuse


@pytest.mark.usefixtures("small_pieces")
def test_refusal_of_any_write_names_path_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, errors = os.write, []
    for call in range(1000):
        path = tmp_path / str(call)
        monkeypatch.setattr(os, "write", refusing_at(call, errno.ENOSPC, real))
        try:
            check(path, write(FRAGMENTS, path, needed_bytes=123456))
            break
        except StorageError as error:
            errors.append((error.problem, error.action))
    assert len(errors) > 20
    action = "free some space, then rerun the same command to resume: older checkpoints are kept"
    for number, found in enumerate(errors):
        path = tmp_path / str(number)
        problem = f"{path} cannot be written: No space left on device; the checkpoint takes 123,456 bytes"
        assert found == (problem, action)


@pytest.mark.parametrize("call", ["write", "fsync", "open"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EFBIG])
def test_refusal_of_every_call_is_an_error(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, call, refusing_at(0, number, getattr(os, call)))
    with pytest.raises(StorageError) as caught:
        write(FRAGMENTS, tmp_path / "one", needed_bytes=9)
    assert caught.value.problem == (
        f"{tmp_path / 'one'} cannot be written: {os.strerror(number)}; the checkpoint takes 9 bytes"
    )


def test_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "one").touch()
    with pytest.raises(StorageError, match=r"one cannot be written: File exists"):
        write(FRAGMENTS, tmp_path / "one", needed_bytes=0)


def save(folder: Path, *ranks: dict[str, torch.Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    for rank, fragments in enumerate(ranks):
        (folder / file_name(rank)).unlink(missing_ok=True)
        write(fragments, folder / file_name(rank), needed_bytes=0)


WHOLE: dict[str, dict[str, Any]] = {"w": {"shape": [2, 5], "step": 3}, "b": {"shape": [4], "step": None}}


def cut(start: int, end: int, name: str = "w", *kinds: str) -> dict[str, torch.Tensor]:
    return {key_of(name, kind, start): torch.arange(float(start), end) for kind in kinds or KINDS}


GOOD = ({**cut(0, 4), **cut(0, 4, "b", MASTER)}, cut(4, 10))


FAULTS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "gap": (cut(5, 10), "hold elements 4 to 4 of w/fp32 nowhere"),
    "overlap": (cut(3, 10), "hold elements 3 to 3 of w/fp32 twice"),
    "short": (cut(4, 9), "hold elements 9 to 9 of w/fp32 nowhere"),
    "long": (cut(4, 11), "hold elements 10 to 10 of w/fp32 twice"),
    "no moment": (cut(4, 10, "w", "fp32", "exp_avg"), "hold elements 4 to 9 of w/exp_avg_sq nowhere"),
    "absent": ({}, "hold elements 4 to 9 of w/fp32 nowhere"),
    "strange": ({**cut(4, 10), **cut(0, 1, "c", MASTER)}, "hold c/fp32, which the model does not have"),
    "moments before the first update": (
        {**cut(4, 10), **cut(0, 4, "b", "exp_avg")},
        "hold b/exp_avg, which the model does not have",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_gap_or_overlap_is_an_error(name: str, tmp_path: Path) -> None:
    fragments, problem = FAULTS[name]
    save(tmp_path, GOOD[0], fragments)
    with pytest.raises(TrainingError) as caught:
        check_coverage(tmp_path, 2, WHOLE)
    assert caught.value.problem == f"the fragments in {tmp_path} {problem}"
    assert "nothing was published, older checkpoints are kept" in caught.value.action


@given(ends=st.sets(st.integers(1, 29), max_size=6), wanted=st.tuples(st.integers(0, 30), st.integers(0, 30)))
def test_any_elements_are_copied_from_any_fragments(
    tmp_path_factory: pytest.TempPathFactory, ends: set[int], wanted: tuple[int, int]
) -> None:
    folder, bounds = tmp_path_factory.mktemp("cut"), [0, *sorted(ends), 30]
    save(folder, *({**cut(bounds[at], bounds[at + 1])} for at in range(len(bounds) - 1)))
    first, end = sorted(wanted)
    out = torch.zeros(end - first)
    Fragments(folder, len(bounds) - 1).copy("w", "exp_avg", first, out)
    assert out.tolist() == list(range(first, end))


def test_missing_elements_are_an_error(tmp_path: Path) -> None:
    save(tmp_path, *GOOD)
    check_coverage(tmp_path, 2, WHOLE)
    with pytest.raises(CheckpointError, match=r"lacks elements 8 to 11 of w/fp32"):
        Fragments(tmp_path, 2).copy("w", MASTER, 8, torch.zeros(4))


def test_disk_must_have_space_for_all_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
