import hashlib
import math
import struct
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from inheritune_ds.data.stream import BatchStream, TokenWindows, WindowOrder, windows_in
from inheritune_ds.errors import CorpusError

SEEDS = st.integers(0, 2**64 - 1)

GOLDEN_10 = [2, 1, 6, 3, 8, 0, 7, 9, 4, 5, 8, 7, 0, 4, 2, 3, 9, 6, 1, 5]
GOLDEN_4M = [1658940, 513213, 227445, 736219, 3442915, 2355747, 235315, 252566, 1927225, 1370471]
GOLDEN_SHA256 = "44c3446a5b132c63a94a29566539998ad149effbe1568a192aa60d893faf4db9"


def token_file(path: Path, num_tokens: int, dtype: str = "<u2") -> Path:
    tokens = (np.arange(num_tokens, dtype=np.uint64) * 40503 % 65521).astype(dtype)
    path.write_bytes(tokens.tobytes())
    return path


def make_stream(folder: Path, num_windows: int, batch_windows: int, seq_len: int = 4, seed: int = 7) -> BatchStream:
    num_tokens = num_windows * seq_len + 1
    windows = TokenWindows(token_file(folder / "train.bin", num_tokens), "uint16", seq_len, num_tokens)
    return BatchStream(windows, WindowOrder(num_windows, seed), batch_windows)


def ids_from(order: WindowOrder, first: int, count: int) -> list[int]:
    ids: list[int] = order.at(np.arange(first, first + count, dtype=np.int64))[1].tolist()
    return ids


@pytest.mark.parametrize(
    ("num_tokens", "seq_len", "expected"),
    [(0, 4, 0), (1, 4, 0), (4, 4, 0), (5, 4, 1), (8, 4, 1), (9, 4, 2), (10, 4, 2), (13, 4, 3), (2, 1, 1)],
)
def test_windows_in_counts_windows_with_a_next_token(num_tokens: int, seq_len: int, expected: int) -> None:
    assert windows_in(num_tokens, seq_len) == expected


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_token_windows_equal_an_independent_reader(tmp_path: Path, dtype: str) -> None:
    num_tokens, seq_len = 103, 10
    path = token_file(tmp_path / "t.bin", num_tokens, "<u2" if dtype == "uint16" else "<u4")
    windows = TokenWindows(path, dtype, seq_len, num_tokens)
    tokens = struct.unpack(f"<{num_tokens}{'H' if dtype == 'uint16' else 'I'}", path.read_bytes())

    def nanogpt_like(i: int) -> tuple[list[int], list[int]]:
        return list(tokens[i : i + seq_len]), list(tokens[i + 1 : i + 1 + seq_len])

    assert len(windows) == 10
    ids = np.array([9, 0, 3, 3], dtype=np.int64)
    rows = windows.read(ids)
    assert rows.dtype == np.int64
    assert rows.shape == (4, seq_len + 1)
    for row, window in zip(rows, ids.tolist(), strict=True):
        x, y = nanogpt_like(window * seq_len)
        assert row[:-1].tolist() == x
        assert row[1:].tolist() == y


def test_token_windows_make_every_token_but_the_first_a_target_once(tmp_path: Path) -> None:
    num_tokens = 41
    path = token_file(tmp_path / "t.bin", num_tokens)
    windows = TokenWindows(path, "uint16", 8, num_tokens)
    targets = windows.read(np.arange(len(windows)))[:, 1:].ravel()
    assert targets.tolist() == np.frombuffer(path.read_bytes(), "<u2")[1:].tolist()


def test_token_windows_of_an_empty_file_are_none(tmp_path: Path) -> None:
    windows = TokenWindows(token_file(tmp_path / "t.bin", 0), "uint16", 8, 0)
    assert len(windows) == 0
    with pytest.raises(ValueError, match=r"outside \[0, 0\)"):
        windows.read(np.array([0]))


@pytest.mark.parametrize("bad", [-1, 10])
def test_token_windows_refuse_an_id_out_of_range(tmp_path: Path, bad: int) -> None:
    windows = TokenWindows(token_file(tmp_path / "t.bin", 101), "uint16", 10, 101)
    with pytest.raises(ValueError, match=r"outside \[0, 10\)"):
        windows.read(np.array([0, bad]))


def test_token_windows_name_a_missing_or_cut_file(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"(?s)gone\.bin: the token file is missing, its manifest says 20.*remove"):
        TokenWindows(tmp_path / "gone.bin", "uint16", 4, 10)
    path = token_file(tmp_path / "t.bin", 9)
    with pytest.raises(CorpusError, match="has 18 bytes, its manifest says 20"):
        TokenWindows(path, "uint16", 4, 10)


@given(num_windows=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 2**20))
@settings(max_examples=150, deadline=None)
def test_window_order_shows_each_window_once_an_epoch(num_windows: int, seed: int, epoch: int) -> None:
    first = epoch * num_windows
    epochs, ids = WindowOrder(num_windows, seed).at(np.arange(first, first + num_windows, dtype=np.int64))
    assert sorted(ids.tolist()) == list(range(num_windows))
    assert set(epochs.tolist()) == {epoch}


def test_window_order_is_a_permutation_of_millions() -> None:
    num_windows = 1_000_003
    ids = WindowOrder(num_windows, 1337).at(np.arange(num_windows))[1]
    assert np.array_equal(np.bincount(ids, minlength=num_windows), np.ones(num_windows, dtype=np.int64))


@given(
    num_windows=st.integers(1, 2**40), seed=SEEDS, positions=st.lists(st.integers(0, 2**50), min_size=1, max_size=40)
)
@settings(max_examples=100, deadline=None)
def test_window_order_gives_one_position_what_it_gives_many(num_windows: int, seed: int, positions: list[int]) -> None:
    order = WindowOrder(num_windows, seed)
    epochs, ids = order.at(np.array(positions, dtype=np.int64))
    for index, position in enumerate(positions):
        one_epoch, one_id = order.at(np.array([position], dtype=np.int64))
        assert (one_epoch[0], one_id[0]) == (epochs[index], ids[index])
        assert epochs[index] == position // num_windows
        assert 0 <= ids[index] < num_windows


def test_window_order_differs_by_epoch_and_by_seed() -> None:
    n = 1000
    first, second = ids_from(WindowOrder(n, 1), 0, n), ids_from(WindowOrder(n, 1), n, n)
    other = ids_from(WindowOrder(n, 2), 0, n)
    # A random permutation agrees with another in about 1 place, whatever n is.
    for left, right in ((first, second), (first, other), (second, other), (first, list(range(n)))):
        assert sum(a == b for a, b in zip(left, right, strict=True)) < 10


def test_window_order_of_one_seed_is_not_another_one_shifted_by_an_epoch() -> None:
    n = 1000
    epochs_of_0 = [ids_from(WindowOrder(n, 0), epoch * n, n) for epoch in range(4)]
    epochs_of_1 = [ids_from(WindowOrder(n, 1), epoch * n, n) for epoch in range(4)]
    assert all(a != b for a in epochs_of_0 for b in epochs_of_1)


@pytest.mark.parametrize("num_windows", [2, 3, 4, 7, 16, 50])
def test_window_order_looks_uniform(num_windows: int) -> None:
    """Chi-square over epochs: the window that stands first (and last) is any one equally often."""
    num_epochs = 200 * num_windows
    order = WindowOrder(num_windows, 5)
    for place in (0, num_windows - 1):
        ids = order.at(np.arange(num_epochs, dtype=np.int64) * num_windows + place)[1]
        counts = Counter(ids.tolist())
        chi_square = sum((counts[window] - 200) ** 2 / 200 for window in range(num_windows))
        freedom = num_windows - 1
        assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_window_order_separates_neighbours() -> None:
    ids = np.array(ids_from(WindowOrder(10_000, 3), 0, 10_000))
    steps = np.abs(np.diff(ids))
    # Two random windows of n are n / 3 apart on average; the standard error here is 24.
    assert abs(float(steps.mean()) - 10_000 / 3) < 120
    assert np.corrcoef(ids[:-1], ids[1:])[0, 1] == pytest.approx(0, abs=0.04)


def test_window_order_never_changes() -> None:
    """Golden values: a change here changes the data order of every run ever made."""
    assert ids_from(WindowOrder(10, 1337), 0, 20) == GOLDEN_10
    assert ids_from(WindowOrder(4_000_000, 1337), 31_999_990, 10) == GOLDEN_4M
    ids = np.array(ids_from(WindowOrder(12_345, 2**64 - 1), 0, 3 * 12_345), dtype="<i8")
    assert hashlib.sha256(ids.tobytes()).hexdigest() == GOLDEN_SHA256


def test_window_order_needs_windows() -> None:
    with pytest.raises(ValueError, match="num_windows must be at least 1, not 0"):
        WindowOrder(0, 1)


def test_window_order_looks_up_a_batch_quickly() -> None:
    order = WindowOrder(4_000_000, 1337)
    order.at(np.arange(512))
    times_s = []
    for batch in range(50):
        started_s = time.perf_counter()
        order.at(np.arange(batch * 512, (batch + 1) * 512))
        times_s.append(time.perf_counter() - started_s)
    # About 0.1 ms; the bound is wide because other work shares the machine.
    assert min(times_s) < 1e-3


def global_rows(stream: BatchStream, step: int, world_size: int, micro_batch_size: int) -> NDArray[np.int64]:
    """Put the rows of all ranks together in the order (micro-batch, rank, row)."""
    per_rank = [
        list(stream.micro_batches(step, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size))
        for rank in range(world_size)
    ]
    assert {len(micro_batches) for micro_batches in per_rank} == {
        stream.batch_windows // (world_size * micro_batch_size)
    }
    return np.concatenate([rows for micro_step in zip(*per_rank, strict=True) for rows in micro_step])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_batch_stream_gives_the_same_sequence_to_any_number_of_ranks(
    tmp_path: Path, world_size: int, micro_batch_size: int
) -> None:
    stream = make_stream(tmp_path, num_windows=103, batch_windows=72)
    for step in (0, 1, 5):
        expected = stream.windows.read(stream.window_ids(step))
        assert np.array_equal(global_rows(stream, step, world_size, micro_batch_size), expected)


def test_batch_stream_gives_each_rank_its_own_rows(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, num_windows=50, batch_windows=12)
    ids = stream.window_ids(2)
    rows = list(stream.micro_batches(2, rank=1, world_size=3, micro_batch_size=2))
    # micro * (world * size) + rank * size + j with world 3, size 2: rows 2, 3 and 8, 9.
    assert np.array_equal(rows[0], stream.windows.read(ids[[2, 3]]))
    assert np.array_equal(rows[1], stream.windows.read(ids[[8, 9]]))
    assert len(rows) == 2


@given(
    num_windows=st.integers(1, 60),
    batch_windows=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    start=st.integers(0, 50),
)
@settings(max_examples=60, deadline=None)
def test_batch_stream_seek_equals_walk(
    tmp_path_factory: pytest.TempPathFactory, num_windows: int, batch_windows: int, seed: int, start: int
) -> None:
    folder = tmp_path_factory.mktemp("stream")
    stream = make_stream(folder, num_windows, batch_windows, seed=seed)
    walked = np.concatenate([stream.window_ids(step) for step in range(start + 3)])
    again = make_stream(folder, num_windows, batch_windows, seed=seed)
    sought = np.concatenate([again.window_ids(step) for step in range(start, start + 3)])
    assert np.array_equal(walked[start * batch_windows :], sought)
    assert np.array_equal(walked, ids_from(again.order, 0, walked.size))


def test_batch_stream_shows_each_window_once_an_epoch(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, num_windows=35, batch_windows=14)
    seen = np.concatenate([stream.window_ids(step) for step in range(10)])
    for epoch in range(4):
        assert sorted(seen[epoch * 35 : (epoch + 1) * 35].tolist()) == list(range(35))


def test_batch_stream_refuses_what_does_not_fit(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, num_windows=20, batch_windows=12)
    with pytest.raises(ValueError, match=r"rank 2 outside \[0, 2\)"):
        stream.micro_batches(0, rank=2, world_size=2, micro_batch_size=1)
    with pytest.raises(ValueError, match=r"rank -1 outside \[0, 2\)"):
        stream.micro_batches(0, rank=-1, world_size=2, micro_batch_size=1)
    with pytest.raises(ValueError, match="batch_windows 12 does not divide into 5 ranks x 1 windows"):
        stream.micro_batches(0, rank=0, world_size=5, micro_batch_size=1)
    with pytest.raises(ValueError, match="does not divide into 1 ranks x 0 windows"):
        stream.micro_batches(0, rank=0, world_size=1, micro_batch_size=0)
    with pytest.raises(ValueError, match="step must be at least 0, not -1"):
        stream.micro_batches(-1, rank=0, world_size=1, micro_batch_size=1)
    with pytest.raises(ValueError, match="batch_windows must be at least 1, not 0"):
        BatchStream(stream.windows, stream.order, 0)
    with pytest.raises(ValueError, match="the order is of 21 windows, the file has 20"):
        BatchStream(stream.windows, WindowOrder(21, 1), 4)
