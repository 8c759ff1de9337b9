from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inheritune_ds.config.selection import ALLOWED, parse
from inheritune_ds.errors import InherituneError, RecipeError, SurgeryError

SCORES = {"rank": [1.0, 9.0, 3.0, 9.0, 7.0, 0.5]}
DEPTHS = st.integers(1, 80)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("first:1", (0,)),
        ("first:4", (0, 1, 2, 3)),
        ("first:6", (0, 1, 2, 3, 4, 5)),
        ("last:2", (4, 5)),
        ("range:1-3", (1, 2, 3)),
        ("range:5-5", (5,)),
        ("every:1", (0, 1, 2, 3, 4, 5)),
        ("every:2", (0, 2, 4)),
        ("every:4", (0, 4)),
        ("even:2", (0, 5)),
        ("even:3", (0, 3, 5)),
        ("even:4", (0, 2, 3, 5)),
        ("even:6", (0, 1, 2, 3, 4, 5)),
        ("drop:0-0", (1, 2, 3, 4, 5)),
        ("drop:2-4", (0, 1, 5)),
        ("by:rank:1", (1,)),
        ("by:rank:3", (1, 3, 4)),
        ("by:rank:6", (0, 1, 2, 3, 4, 5)),
        ("3", (3,)),
        ("0-1,4-5", (0, 1, 4, 5)),
        ("0-2,0-2", (0, 1, 2, 0, 1, 2)),
        ("5,0,3", (5, 0, 3)),
        ("2,2,2", (2, 2, 2)),
        ("005", (5,)),
    ],
)
def test_selection_keeps_the_blocks_of_its_form(text: str, expected: tuple[int, ...]) -> None:
    selection = parse(text)
    assert selection.text == text
    assert selection.blocks(6, SCORES) == expected


def test_even_reproduces_published_choices() -> None:
    assert parse("even:6").blocks(26) == (0, 5, 10, 15, 20, 25)
    assert parse("0,3,10,15,22,25").blocks(26) == (0, 3, 10, 15, 22, 25)


@pytest.mark.parametrize(
    ("text", "at", "expected"),
    [
        ("", 0, "a number"),
        ("first:", 6, "a number"),
        ("first:x", 6, "a number"),
        ("first:-1", 6, "a number"),
        ("first: 2", 6, "a number"),
        ("first:0", 6, "a number of at least 1"),
        ("last:00", 5, "a number of at least 1"),
        ("every:0", 6, "a number of at least 1"),
        ("even:0", 5, "a number of at least 1"),
        ("first:2x", 7, "nothing more"),
        ("first:1,2", 7, "nothing more"),
        ("range:3", 7, "'-' and the last block"),
        ("range:-3", 6, "a number"),
        ("range:1-", 8, "a number"),
        ("range:1-2,4", 9, "nothing more"),
        ("range:5-4", 8, "a block not before 5"),
        ("drop:4-2", 7, "a block not before 4"),
        ("drop:4", 6, "'-' and the last block"),
        ("by:", 3, "a score's name, such as rank or influence"),
        ("by:4", 3, "a score's name, such as rank or influence"),
        ("by:rank", 7, "':' and a number of blocks"),
        ("by:2rank:4", 3, "a score's name, such as rank or influence"),
        ("by:rank.2:4", 7, "':' and a number of blocks"),
        ("by:rank:", 8, "a number"),
        ("by:rank:0", 8, "a number of at least 1"),
        ("by:rank:4.", 9, "nothing more"),
        ("frist:3", 0, "'first:'"),
        ("evens:3", 0, "'even:'"),
        ("First:3", 0, "'first:'"),
        ("first", 0, "'first:' and a number"),
        ("middle:3", 0, "a form or a block's number"),
        (":3", 0, "a form or a block's number"),
        ("all", 0, "a form or a block's number"),
        ("-1", 0, "a form or a block's number"),
        ("0-7;20", 3, "','"),
        ("0 ,1", 1, "',' or '-'"),
        ("0,", 2, "a number"),
        ("0,,1", 2, "a number"),
        ("0-7-9", 3, "','"),
        ("0-", 2, "a number"),
        ("3-1", 2, "a block not before 3"),
        ("²", 0, "a number"),
        ("first:" + "9" * 19, 24, "nothing more"),
    ],
)
def test_parse_points_at_the_invalid_character(text: str, at: int, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    problem, shown, caret = caught.value.problem.split("\n")
    assert problem == f"select: {text!r} cannot be read at character {at + 1}: {expected} expected"
    assert shown == f"      {text}"
    assert caret == " " * 6 + " " * at + "^"
    assert caught.value.allowed == ALLOWED


@pytest.mark.parametrize(
    ("text", "depth", "problem", "allowed"),
    [
        ("first:5", 4, "5 is not possible, the reference has 4 blocks", "first:1 to first:4"),
        ("first:9999999999", 4, "9999999999 is not possible, the reference has 4 blocks", "first:1 to first:4"),
        ("last:9", 4, "9 is not possible, the reference has 4 blocks", "last:1 to last:4"),
        ("every:5", 4, "5 is not possible, the reference has 4 blocks", "every:1 to every:4"),
        ("even:1", 4, "1 is not possible, the reference has 4 blocks", "even:2 to even:4"),
        ("even:2", 1, "even:n needs at least 2 blocks, the reference has 1", ""),
        ("by:rank:5", 4, "5 is not possible, the reference has 4 blocks", "by:rank:1 to by:rank:4"),
        ("range:2-4", 4, "the reference has no block 4", "blocks 0 to 3"),
        ("range:6-8", 4, "the reference has no block 6", "blocks 0 to 3"),
        ("drop:3-4", 4, "the reference has no block 4", "blocks 0 to 3"),
        ("drop:0-3", 4, "this drops all 4 blocks of the reference", "at least one block is kept"),
        ("0-1,4", 4, "the reference has no block 4", "blocks 0 to 3"),
        ("0-999999999", 4, "the reference has no block 999999999", "blocks 0 to 3"),
    ],
)
def test_selection_refuses_blocks_that_the_reference_does_not_have(
    text: str, depth: int, problem: str, allowed: str
) -> None:
    selection = parse(text)
    with pytest.raises(SurgeryError) as caught:
        selection.blocks(depth, {"rank": [1.0] * depth})
    assert caught.value.problem == f"select {text}: {problem}"
    assert caught.value.allowed == allowed


@pytest.mark.parametrize(("depth", "half"), [(4, 2), (2, 1), (5, 2)])
def test_selection_suggests_the_method_s_default(depth: int, half: int) -> None:
    with pytest.raises(SurgeryError) as caught:
        parse(f"first:{depth + 1}").blocks(depth)
    assert caught.value.action == f"select=first:{half} keeps half of the blocks, the method's default"


def test_selection_of_a_single_block_has_no_half() -> None:
    with pytest.raises(SurgeryError) as caught:
        parse("first:2").blocks(1)
    assert str(caught.value) == "select first:2: 2 is not possible, the reference has 1 block\n  allowed: first:1"


@pytest.mark.parametrize("name", ["Rank", "BI-1", "mass_2", "r2"])
def test_scores_may_have_any_plain_name(name: str) -> None:
    assert parse(f"by:{name}:2").blocks(3, {name: [1.0, 3.0, 2.0]}) == (1, 2)


@pytest.mark.parametrize(
    ("names", "count", "problem", "allowed"),
    [
        ([], 6, "no scores named 'influence' were given", ""),
        (["rank", "mass"], 6, "no scores named 'influence' were given", "one of mass, rank"),
        (["influence"], 5, "5 scores named 'influence', but the reference has 6 blocks", "6 numbers, block 0 first"),
    ],
)
def test_scores_must_be_given_one_per_block(names: list[str], count: int, problem: str, allowed: str) -> None:
    with pytest.raises(SurgeryError) as caught:
        parse("by:influence:2").blocks(6, {name: [1.0] * count for name in names})
    assert caught.value.problem == f"select by:influence:2: {problem}"
    assert caught.value.allowed == allowed
    assert ("block_scores" in caught.value.action) is problem.startswith("no scores")


def test_of_equal_scores_the_earlier_block_is_kept() -> None:
    assert parse("by:s:2").blocks(4, {"s": [1.0, 1.0, 1.0, 1.0]}) == (0, 1)
    assert parse("by:s:2").blocks(4, {"s": [0.0, 2.0, -1.0, 2.0]}) == (1, 3)
    assert parse("by:s:1").blocks(3, {"s": [-3.0, -1.0, -2.0]}) == (1,)


@given(DEPTHS, st.data())
def test_even_keeps_first_and_last_and_spaces_the_others(depth: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, max(2, depth)))
    if depth < 2:
        return
    kept = parse(f"even:{count}").blocks(depth)
    gaps = [after - before for before, after in pairwise(kept)]
    assert (kept[0], kept[-1], len(kept)) == (0, depth - 1, count)
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1


@given(DEPTHS, st.data())
def test_drop_and_range_are_complementary(depth: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, depth - 1))
    last = data.draw(st.integers(first, depth - 1))
    inside = parse(f"range:{first}-{last}").blocks(depth)
    assert inside == tuple(range(first, last + 1))
    if len(inside) < depth:
        assert sorted(inside + parse(f"drop:{first}-{last}").blocks(depth)) == list(range(depth))


@given(DEPTHS, st.data())
def test_first_and_last_are_complementary(depth: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, depth))
    if count < depth:
        assert parse(f"first:{count}").blocks(depth) + parse(f"last:{depth - count}").blocks(depth) == tuple(
            range(depth)
        )
    assert parse(f"every:{count}").blocks(depth) == tuple(range(depth))[::count]


@given(st.lists(st.integers(0, 79), min_size=1, max_size=40))
def test_a_list_gives_the_blocks_that_it_names(blocks: list[int]) -> None:
    assert parse(",".join(map(str, blocks))).blocks(80) == tuple(blocks)
    assert parse(",".join(f"{block}-{block}" for block in blocks)).blocks(80) == tuple(blocks)


@given(DEPTHS, st.data())
def test_by_keeps_the_best_in_the_reference_s_order(depth: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, depth))
    scores = data.draw(st.lists(st.floats(-1e6, 1e6), min_size=depth, max_size=depth))
    kept = parse(f"by:score:{count}").blocks(depth, {"score": scores})
    left = set(range(depth)) - set(kept)
    assert list(kept) == sorted(set(kept))
    assert len(kept) == count
    assert all(scores[one] >= scores[other] for one in kept for other in left)


@given(st.text(st.sampled_from("0123456789-,: firstlaevnydopby")) | st.text(max_size=12), st.integers(1, 12))
def test_any_text_is_a_selection_of_blocks_that_exist_or_one_error(text: str, depth: int) -> None:
    try:
        selection = parse(text)
        kept = selection.blocks(depth, {"s": [0.0] * depth})
    except InherituneError as error:
        assert text in str(error)  # noqa: PT017 - either outcome is right
    else:
        assert kept
        assert all(0 <= block < depth for block in kept)
