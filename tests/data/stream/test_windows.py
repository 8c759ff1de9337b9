import os
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inheritune_ds.data.stream.validation_windows import HeldOut
from inheritune_ds.data.stream.windows import SourceTokens, TokenShards, Windows
from inheritune_ds.errors import CorpusError


def token_file(path: Path, num_tokens: int, dtype: str = "<u2") -> Path:
    tokens = (np.arange(num_tokens, dtype=np.uint64) * 40503 % 65521).astype(dtype)
    path.write_bytes(tokens.tobytes())
    return path


def shards_of(folder: Path, counts: list[int]) -> tuple[TokenShards, list[int]]:
    """Shards of so many tokens, and all their tokens."""
    tokens = np.arange(sum(counts), dtype="<u2")
    paths = [folder / f"train-{number:05}.bin" for number in range(len(counts))]
    for path, part in zip(paths, np.split(tokens, np.cumsum(counts)[:-1]), strict=True):
        part.tofile(path)
    return TokenShards(paths, counts, "uint16"), tokens.tolist()


@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(any),
    length=st.integers(1, 30),
    data=st.data(),
)
def test_shards_read_as_one_sequence(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], length: int, data: st.DataObject
) -> None:
    shards, tokens = shards_of(tmp_path_factory.mktemp("shards"), counts)
    length = min(length, len(tokens))
    starts = data.draw(st.lists(st.integers(0, len(tokens) - length), max_size=8))
    rows = shards.read(np.array(starts, dtype=np.int64), length)
    assert len(shards) == len(tokens)
    assert rows.dtype == np.int64
    assert rows.shape == (len(starts), length)
    assert rows.tolist() == [tokens[start : start + length] for start in starts]


@pytest.mark.parametrize("start", [-1, 7, 8])
def test_shards_refuse_a_span_outside(tmp_path: Path, start: int) -> None:
    shards, _ = shards_of(tmp_path, [5, 5])
    with pytest.raises(ValueError, match=rf"spans of 4 from 0 to {start}|spans of 4 from {start} to 0"):
        shards.read(np.array([0, start]), 4)


def test_thousands_of_shards_keep_no_descriptor(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    shards, tokens = shards_of(tmp_path, [3] * 3000)
    assert len(list(Path("/proc/self/fd").iterdir())) - before < 5
    assert shards.read(np.array([1, 4000]), 4999).tolist() == [tokens[1:5000], tokens[4000:8999]]


def test_a_shard_that_is_removed_later_can_still_be_read(tmp_path: Path) -> None:
    shards, tokens = shards_of(tmp_path, [5, 5])
    (tmp_path / "train-00001.bin").unlink()
    assert shards.read(np.array([0]), 10).tolist() == [tokens]


def drop_from_memory(path: Path) -> None:
    """Ask the system to drop a file from memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def pages_in_memory(path: Path, offsets: range) -> int:
    """How many pages of a file, of those at the offsets, are in memory; asking for them brings them there."""
    found, page = 0, bytearray(1)
    with path.open("rb") as file:
        for offset in offsets:
            try:
                found += os.preadv(file.fileno(), [page], offset, os.RWF_NOWAIT)
            except BlockingIOError:
                continue
            except OSError as error:
                pytest.skip(f"this file system does not report which pages are in memory ({error.strerror})")
    return found


def test_opening_a_shard_does_not_read_it(tmp_path: Path) -> None:
    path, num_tokens = tmp_path / "t.bin", 1 << 24
    path.write_bytes(bytes(2 * num_tokens))
    places = range(1 << 19, 1 << 22, 1 << 19)
    drop_from_memory(path)
    if pages_in_memory(path, places) > 1:
        pytest.skip("this file system keeps in memory what it is asked to drop")
    drop_from_memory(path)
    shards = TokenShards([path], [num_tokens], "uint16")
    assert shards.read(np.array([num_tokens - 3]), 3).tolist() == [[0, 0, 0]]
    # Arrow's own buffer of the whole file has megabytes of it read ahead, all 7 of these pages among them.
    assert pages_in_memory(path, places) < 4


def test_shards_name_a_missing_or_cut_file(tmp_path: Path) -> None:
    with pytest.raises(
        CorpusError, match=r"(?s)gone\.bin: the token file is missing, but its manifest says 20.*to remake"
    ):
        TokenShards([tmp_path / "gone.bin"], [10], "uint16")
    whole, cut = token_file(tmp_path / "whole.bin", 10), token_file(tmp_path / "cut.bin", 9)
    with pytest.raises(CorpusError, match=r"cut\.bin: the token file has 18 bytes, but its manifest says 20"):
        TokenShards([whole, cut], [10, 10], "uint16")


def test_shards_name_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, f"Failed to open local file '{path}'. Detail: [errno 13] Permission denied")

    monkeypatch.setattr(pa, "memory_map", refuse)
    with pytest.raises(CorpusError, match=r"(?s)t\.bin: the token file cannot be read \(.*denied.*check its permis"):
        TokenShards([token_file(tmp_path / "t.bin", 9)], [9], "uint16")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_windows_equal_an_independent_reader(tmp_path: Path, dtype: str) -> None:
    path = token_file(tmp_path / "t.bin", 103, "<u2" if dtype == "uint16" else "<u4")
    windows = Windows.of_file(path, dtype, 10, 103)
    tokens = struct.unpack(f"<103{'H' if dtype == 'uint16' else 'I'}", path.read_bytes())
    assert len(windows) == 10
    rows = HeldOut({"t": windows}, limit=1000, eos_id=0).read(np.array([9, 0, 3, 3], dtype=np.int64))
    assert rows.dtype == np.int64
    assert rows.tolist() == [list(tokens[10 * window : 10 * window + 11]) for window in (9, 0, 3, 3)]


def test_windows_make_every_token_but_the_first_a_target_once(tmp_path: Path) -> None:
    shards, tokens = shards_of(tmp_path, [20, 1, 20])
    windows = Windows(shards, 8)
    targets = HeldOut({"t": windows}, limit=1000, eos_id=0).read(np.arange(len(windows)))[:, 1:].ravel()
    assert targets.tolist() == tokens[1:]


def test_end_tokens_are_found_in_all_parts_of_a_long_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inheritune_ds.data.stream.windows._SEARCHED_TOKENS", 4)
    np.asarray([1, 0, 0, 2, 0, 3, 3, 3, 3, 0], "<u2").tofile(tmp_path / "a.bin")
    np.asarray([0, 1], "<u2").tofile(tmp_path / "b.bin")
    shards = TokenShards([tmp_path / "a.bin", tmp_path / "b.bin"], [10, 2], "uint16")
    assert shards.find(0).tolist() == [1, 2, 4, 9, 10]
    assert shards.find(7).tolist() == []


def test_source_tokens_are_read_together(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    first, first_tokens = shards_of(tmp_path / "a", [7, 4])
    second, second_tokens = shards_of(tmp_path / "b", [3, 3, 3])
    tokens = SourceTokens({"a": Windows(first, 4), "b": Windows(second, 4)})
    assert (tokens.names, tokens.sizes, tokens.counts) == (["a", "b"], [2, 2], [11, 9])
    rows = tokens.read(np.array([1, 0, 1, 0]), np.array([0, 6, 4, 4]))
    expected = [second_tokens[0:5], first_tokens[6:11], second_tokens[4:9], first_tokens[4:9]]
    assert rows.tolist() == expected
