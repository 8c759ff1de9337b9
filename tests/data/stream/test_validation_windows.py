import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inheritune_ds.data.stream.validation_windows import HeldOut
from inheritune_ds.data.stream.windows import TokenShards, Windows

SEQ_LEN = 4


def windows_of(folder: Path, number: int, count: int) -> Windows:
    """So many windows of a source; its tokens begin at 1000 * number."""
    num_tokens = count * SEQ_LEN + 1
    path = folder / f"{number}.bin"
    (1000 * number + np.arange(num_tokens, dtype="<u2")).astype("<u2").tofile(path)
    return Windows(TokenShards([path], [num_tokens], "uint16"), SEQ_LEN)


def held_out(folder: Path, sizes: list[int], shares: list[int] | None) -> HeldOut:
    return HeldOut({str(number): windows_of(folder, number, size) for number, size in enumerate(sizes)}, shares)


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
    assert held.seq_len == SEQ_LEN
    assert held.sha256(9) == hashlib.sha256(np.arange(9 * SEQ_LEN + 1, dtype="<u4").tobytes()).hexdigest()


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    shares=st.one_of(st.none(), st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(lambda turns: turns[0])),
)
def test_every_window_is_there_once_and_a_source_keeps_its_order(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], shares: list[int] | None
) -> None:
    shares = None if shares is None else shares[: len(sizes)]
    held = held_out(tmp_path_factory.mktemp("held"), sizes, shares)
    order = order_of(held)
    assert sorted(order) == [(source, window) for source, size in enumerate(sizes) for window in range(size)]
    for source, size in enumerate(sizes):
        assert [window for number, window in order if number == source] == list(range(size))
    for count in range(len(order) + 1):
        used = held.used(count)
        assert list(used.values()) == [
            sum(number == source for number, _ in order[:count]) for source in range(len(sizes))
        ]
        weights = sizes if shares is None else shares
        if sum(weights) and all(used[str(number)] < size for number, size in enumerate(sizes) if weights[number]):
            for source, weight in enumerate(weights):
                assert abs(used[str(source)] - count * weight / sum(weights)) <= max(1, len(sizes) - 1)


def test_when_a_source_is_used_up_the_others_continue_and_weight_0_is_last(tmp_path: Path) -> None:
    order = order_of(held_out(tmp_path, [2, 5, 2, 3], [3, 1, 0, 1]))
    assert [source for source, _ in order[:10]] == [0, 0, 1, 3, 1, 3, 1, 3, 1, 1]
    assert order[10:] == [(2, 0), (2, 1)]


def test_the_hash_is_of_the_windows_used_source_by_source_and_of_their_order(tmp_path: Path) -> None:
    held = held_out(tmp_path, [6, 3], [2, 1])
    order = [source for source, _ in order_of(held)[:4]]
    assert (held.used(4), sorted(order)) == ({"0": 3, "1": 1}, [0, 0, 0, 1])
    text = [*range(3 * SEQ_LEN + 1), *range(1000, 1000 + SEQ_LEN + 1), *order]
    assert held.sha256(4) == hashlib.sha256(np.array(text, dtype="<u4").tobytes()).hexdigest()
    assert held.sha256(1) == hashlib.sha256(np.array([*range(SEQ_LEN + 1), 0], dtype="<u4").tobytes()).hexdigest()


def test_the_same_windows_in_another_order_have_another_hash(tmp_path: Path) -> None:
    one, other = (held_out(tmp_path, [4, 4], shares) for shares in ([1, 1], [3, 1]))
    assert sorted(order_of(one)) == sorted(order_of(other))
    assert one.used(8) == other.used(8)
    assert one.sha256(8) != other.sha256(8)
    assert one.sha256(8) == held_out(tmp_path, [4, 4], [2, 2]).sha256(8)


def test_held_out_may_be_empty(tmp_path: Path) -> None:
    assert len(held_out(tmp_path, [0, 0], None)) == 0
    assert held_out(tmp_path, [0, 0], [1, 1]).used(0) == {"0": 0, "1": 0}
