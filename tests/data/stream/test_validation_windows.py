import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inheritune_ds.data.stream.validation_windows import HeldOut, strided
from inheritune_ds.data.stream.windows import TokenShards, Windows

SEQ_LEN, EOS = 4, 60_000


def windows_of(folder: Path, number: int, count: int) -> Windows:
    """So many windows of a source; its tokens begin at 1000 * number."""
    num_tokens = count * SEQ_LEN + 1
    path = folder / f"{number}.bin"
    (1000 * number + np.arange(num_tokens, dtype="<u2")).astype("<u2").tofile(path)
    return Windows(TokenShards([path], [num_tokens], "uint16"), SEQ_LEN)


def held_out(folder: Path, sizes: list[int], shares: list[int] | None, limit: int = 1000) -> HeldOut:
    sources = {str(number): windows_of(folder, number, size) for number, size in enumerate(sizes)}
    return HeldOut(sources, limit=limit, eos_id=EOS, shares=shares)


def order_of(held: HeldOut) -> list[tuple[int, int]]:
    """(source, window) in the order, from the tokens themselves."""
    rows = held.read(np.arange(len(held)))
    for row in rows.tolist():
        assert row == list(range(row[0], row[0] + SEQ_LEN + 1))
    return [(first // 1000, first % 1000 // SEQ_LEN) for first in rows[:, 0].tolist()]


@pytest.mark.parametrize("shares", [None, [1]])
def test_a_single_source_keeps_its_order(tmp_path: Path, shares: list[int] | None) -> None:
    held = held_out(tmp_path, [9], shares)
    assert order_of(held) == [(0, window) for window in range(9)]
    assert (held.seq_len, held.available) == (SEQ_LEN, 9)
    rows = [np.arange(first, first + SEQ_LEN + 1, dtype="<u4") for first in range(0, 9 * SEQ_LEN, SEQ_LEN)]
    assert held.sha256() == hashlib.sha256(np.concatenate(rows).tobytes()).hexdigest()


def test_strided_windows_are_spread_over_the_whole_part() -> None:
    assert strided(9, 9).tolist() == list(range(9))
    assert strided(9, 3).tolist() == [1, 4, 7]
    assert strided(10, 4).tolist() == [1, 3, 6, 8]
    assert strided(7, 0).tolist() == []


@given(data=st.data(), size=st.integers(1, 10_000))
def test_strided_windows_are_different_ones_one_of_each_equal_part(data: st.DataObject, size: int) -> None:
    count = data.draw(st.integers(1, min(size, 500)))
    found = strided(size, count)
    parts = [(number * size / count, (number + 1) * size / count) for number in range(count)]
    assert all(low - 1 < window < high for window, (low, high) in zip(found.tolist(), parts, strict=True))
    assert (np.diff(found) >= size // count).all()
    assert found[-1] < size


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    shares=st.one_of(st.none(), st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(lambda turns: turns[0])),
)
def test_every_window_is_there_once_and_a_source_keeps_its_order(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], shares: list[int] | None
) -> None:
    shares = None if shares is None else shares[: len(sizes)]
    folder = tmp_path_factory.mktemp("held")
    held = held_out(folder, sizes, shares)
    order = order_of(held)
    assert sorted(order) == [(source, window) for source, size in enumerate(sizes) for window in range(size)]
    for source, size in enumerate(sizes):
        assert [window for number, window in order if number == source] == list(range(size))
    for limit in range(1, len(order) + 1):
        some = held_out(folder, sizes, shares, limit)
        assert [source for source, _ in order_of(some)] == [source for source, _ in order[:limit]]
        for source, size in enumerate(sizes):
            own = [window for number, window in order_of(some) if number == source]
            assert own == strided(size, some.used[str(source)]).tolist()
        weights = sizes if shares is None else shares
        if sum(weights) and all(some.used[str(number)] < size for number, size in enumerate(sizes) if weights[number]):
            for source, weight in enumerate(weights):
                assert abs(some.used[str(source)] - limit * weight / sum(weights)) <= max(1, len(sizes) - 1)


def test_when_a_source_is_used_up_the_others_continue_and_weight_0_is_last(tmp_path: Path) -> None:
    order = order_of(held_out(tmp_path, [2, 5, 2, 3], [3, 1, 0, 1]))
    assert [source for source, _ in order[:10]] == [0, 0, 1, 3, 1, 3, 1, 3, 1, 1]
    assert order[10:] == [(2, 0), (2, 1)]


def test_the_same_windows_in_another_order_have_another_hash(tmp_path: Path) -> None:
    one, other = (held_out(tmp_path, [4, 4], shares) for shares in ([1, 1], [3, 1]))
    assert sorted(order_of(one)) == sorted(order_of(other))
    assert one.used == other.used
    assert one.sha256() != other.sha256()
    assert one.sha256() == held_out(tmp_path, [4, 4], [2, 2]).sha256()
    assert one.sha256() != held_out(tmp_path, [4, 4], [1, 1], limit=7).sha256()


def test_held_out_may_be_empty(tmp_path: Path) -> None:
    assert len(held_out(tmp_path, [0, 0], None)) == 0
    assert held_out(tmp_path, [0, 0], [1, 1]).used == {"0": 0, "1": 0}


def test_documents_of_targets_are_counted_by_their_end_tokens_over_shards_and_sources(tmp_path: Path) -> None:
    texts = [[5, EOS, 6, 6, 6, 6, 6, 6, EOS], [7, 7, 7, EOS, 8, 8, 8, 8, 8, EOS, EOS, 9, 9]]
    sources = {}
    for number, text in enumerate(texts):
        paths = [tmp_path / f"{number}-{part}.bin" for part in range(2)]
        for path, tokens in zip(paths, (text[:3], text[3:]), strict=True):
            np.asarray(tokens, "<u2").tofile(path)
        sources[str(number)] = Windows(TokenShards(paths, [3, len(text) - 3], "uint16"), SEQ_LEN)
    held = HeldOut(sources, limit=100, eos_id=EOS, shares=[1, 1])
    assert held.read(np.arange(5))[:, 0].tolist() == [5, 7, 6, 8, 8]
    # Documents in the order of the text: "5", "6" and, after it, nothing; "7", "8", an empty one, "9".
    assert held.documents(np.arange(5)).tolist() == [
        [0, 1, 1, 1],
        [3, 3, 3, 4],
        [1, 1, 1, 1],
        [4, 4, 4, 4],
        [4, 5, 6, 6],
    ]
