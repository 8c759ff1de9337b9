import pytest

from inheritune_ds.errors import SurgeryError
from inheritune_ds.surgery.selection import select_blocks


@pytest.mark.parametrize(
    ("selection", "depth", "expected"),
    [("first:1", 4, (0,)), ("first:3", 4, (0, 1, 2)), ("first:4", 4, (0, 1, 2, 3)), ("first:10", 12, tuple(range(10)))],
)
def test_select_blocks_keeps_the_first_ones_in_order(selection: str, depth: int, expected: tuple[int, ...]) -> None:
    assert select_blocks(selection, depth) == expected


@pytest.mark.parametrize(("depth", "half"), [(4, 2), (1, 1), (5, 2)])
def test_select_blocks_refuses_more_than_there_are(depth: int, half: int) -> None:
    with pytest.raises(SurgeryError) as caught:
        select_blocks(f"first:{depth + 1}", depth)
    assert caught.value.problem == (
        f"target.select: first:{depth + 1} asks for {depth + 1} blocks, but the reference has {depth}"
    )
    assert caught.value.allowed == f"first:1 to first:{depth}"
    assert caught.value.action.startswith(f"set target.select=first:{half} ")


@pytest.mark.parametrize("selection", ["", "first:", "first:0", "first:-1", "first:2x", "last:2", "xfirst:2", "2"])
def test_select_blocks_refuses_what_is_no_selection(selection: str) -> None:
    with pytest.raises(SurgeryError, match="is no selection") as caught:
        select_blocks(selection, 4)
    assert repr(selection) in caught.value.problem
    assert caught.value.allowed == "first:n, such as first:4"
