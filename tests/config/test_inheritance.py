import pytest

from inheritune_ds.config.inheritance import PARTS, PRESETS, inherited_parts, needed_parts
from inheritune_ds.errors import RecipeError

IN_BLOCKS = {"attention", "attention_norms", "mlp", "mlp_norms"}


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("all", IN_BLOCKS | {"token_embeddings", "position_embeddings", "final_norm", "head"}),
        ("paper-scripts", IN_BLOCKS | {"head"}),
        ("attention-only", {"attention", "attention_norms", "head"}),
        ("mlp-only", {"mlp", "mlp_norms", "head"}),
        ("attention-mlp", {"attention", "mlp", "head"}),
        ("none", set()),
    ],
)
def test_a_preset_has_its_parts(preset: str, expected: set[str]) -> None:
    assert inherited_parts(preset) == expected


def test_presets_and_parts_are_those_of_the_documentation() -> None:
    assert list(PRESETS) == ["all", "moments", "paper-scripts", "attention-only", "mlp-only", "attention-mlp", "none"]
    assert len(set(PARTS)) == 8


@pytest.mark.parametrize(
    ("inherit", "expected"),
    [
        (["head"], {"head"}),
        ("head", {"head"}),
        ("norms", {"attention_norms", "mlp_norms"}),
        (["mlp", "norms", "mlp"], {"mlp", "attention_norms", "mlp_norms"}),
        (" mlp , norms", {"mlp", "attention_norms", "mlp_norms"}),
        ("attention,mlp,head", {"attention", "mlp", "head"}),
        (list(PARTS), set(PARTS)),
        (" all ", set(PARTS)),
    ],
)
def test_a_list_or_string_has_its_parts_and_groups(inherit: str | list[str], expected: set[str]) -> None:
    assert inherited_parts(inherit) == expected


def test_needed_parts_are_the_named_ones() -> None:
    assert needed_parts(inherited_parts("all")) == needed_parts(inherited_parts("paper-scripts")) == []
    assert needed_parts(inherited_parts("none")) == []
    assert needed_parts(inherited_parts("attention-only")) == [("attention",)]
    assert needed_parts(inherited_parts("mlp-only")) == [("mlp",)]
    assert needed_parts(inherited_parts("attention-mlp")) == [("attention",), ("mlp",)]
    assert needed_parts(inherited_parts("head,mlp_norms")) == [("mlp_norms",), ("head",)]
    assert needed_parts(inherited_parts("norms,mlp")) == [("attention_norms", "mlp_norms"), ("mlp",)]


@pytest.mark.parametrize(
    ("inherit", "problem"),
    [
        ("everything", "inherit: 'everything': neither preset nor part"),
        ("attention,mlps", "inherit: 'mlps': neither preset nor part"),
        ("attention,", "inherit: 'attention,' has an empty entry, number 2 of 2"),
        (["", "mlp", "head"], "inherit: ['', 'mlp', 'head'] has an empty entry, number 1 of 3"),
        ("", "inherit: the list of parts is empty"),
        (" , ", "inherit: the list of parts is empty"),
        ("mlp,all", "inherit: 'all' is a preset and cannot be part of a list"),
        (["attention", "mlps", "All"], "inherit: 'mlps', 'All': neither preset nor part"),
        (["paper-scripts"], "inherit: 'paper-scripts' is a preset and cannot be part of a list"),
        ([], "inherit: the list of parts is empty"),
    ],
)
def test_an_unknown_part_is_refused_with_the_known_ones(inherit: str | list[str], problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        inherited_parts(inherit)
    assert caught.value.problem == problem
    assert caught.value.allowed == f"{', '.join(PRESETS)}, or a list of {', '.join(PARTS)}, norms"
