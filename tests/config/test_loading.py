import gzip
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inheritune_ds.config.loading import differences, dump_recipe, load_recipe, read_document, shipped_names
from inheritune_ds.config.messages import validate
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.config.yaml import parse_yaml, write_yaml
from inheritune_ds.errors import RecipeError


def message(*overrides: str, name: str = "quickstart") -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides)
    return str(caught.value)


def test_overrides_are_applied_in_order_and_reach_into_lists() -> None:
    recipe = load_recipe(
        "quickstart",
        [
            "optimizer.lr=5e-4",
            "optimizer.lr=3e-4",
            "corpus.sources.0={kind: files, paths: [a.txt, b.txt]}",
            "corpus.sources.0.paths.1=c.txt",
            "optimizer.betas=[0.8, 0.9]",
            "training.duration=7 steps",
        ],
    )
    assert recipe.optimizer.lr == 3e-4
    assert recipe.corpus.sources[0].model_dump()["paths"] == ["a.txt", "c.txt"]
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert str(recipe.training.duration) == "7 steps"


def test_an_override_reaches_into_a_default_list() -> None:
    assert load_recipe("quickstart", ["optimizer.betas.1=0.99"]).optimizer.betas == (0.9, 0.99)
    both = load_recipe("quickstart", ["optimizer.betas.0=0.5", "optimizer.betas.1=0.6"])
    assert both.optimizer.betas == (0.5, 0.6)
    assert load_recipe("quickstart").optimizer.betas == (0.9, 0.95)


SCRATCH = "{model_type: gpt2, vocab_size: 4096, hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 1, "
SCRATCH += "max_position_embeddings: 128, tie_word_embeddings: true}"


def test_override_makes_a_missing_block_and_unsets_with_nothing() -> None:
    recipe = load_recipe(
        "quickstart", ["export.dtype=bfloat16", "reference=", "target.select=", f"target.shape={SCRATCH}"]
    )
    assert recipe.export.dtype == "bfloat16"
    assert recipe.reference is None
    assert recipe.target.shape is not None
    assert recipe.target.shape.hidden_size == 8


def test_yaml_is_parsed_as_version_1_2() -> None:
    document = parse_yaml("a: 3e-4\nb: on\nc: 1_000\nd: no\ne: 0o17\nf: 012\n", "x")
    assert document == {"a": 3e-4, "b": "on", "c": 1000, "d": "no", "e": 15, "f": 12}
    assert isinstance(document["a"], float)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3\n", 'x.yaml, line 3: found duplicate key "a"'),
        ("a: [\n", "x.yaml, line 2: expected the node content"),
        ("\ta: 1\n", "x.yaml, line 1: found character"),
        ("a: !!python/object:os.system x\n", "x.yaml, line 1: could not determine a constructor"),
        ("a: 1\n---\nb: 2\n", "x.yaml, line 2: but found another document"),
        ("- a\n", "x.yaml: the document is not a mapping"),
        ("", "x.yaml: the document is not a mapping"),
    ],
)
def test_parse_yaml_refuses_anything_but_one_strict_mapping(text: str, problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, "x.yaml")
    assert str(caught.value).startswith(problem)
    assert caught.value.allowed
    assert caught.value.action


def test_validate_refuses_keys_that_are_not_text() -> None:
    document = load_recipe("quickstart").model_dump(mode="json")
    with pytest.raises(RecipeError, match="x: 1: unknown key"):
        validate(Recipe, {**document, 1: 2}, "x")  # type: ignore[dict-item]


def test_load_recipe_suggests_the_nearest_shipped_name() -> None:
    text = message(name="quickstrt")
    assert text.startswith("recipe 'quickstrt' cannot be read: no such file or directory\n")
    assert f"allowed: a YAML file, or one of {', '.join(shipped_names())}" in text
    assert text.endswith("do: did you mean quickstart?")


def test_a_missing_study_is_reported_with_the_shipped_studies() -> None:
    with pytest.raises(RecipeError) as caught:
        read_document("nowhere", "studies")
    assert caught.value.problem == "study 'nowhere' cannot be read: no such file or directory"
    assert caught.value.allowed == f"a YAML file, or one of {', '.join(shipped_names('studies'))}"
    assert caught.value.action == "give a shipped study's name, or the path of a study file"


def test_load_recipe_reads_files_and_names_them_in_problems(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(read_document("quickstart", "recipes")[0], encoding="utf-8")
    assert load_recipe("mine.yaml", beside=tmp_path) == load_recipe(str(path)) == load_recipe("quickstart")
    path.write_text("name: mine\n", encoding="utf-8")
    text = message(name=str(path))
    assert text.startswith(f"8 problems found\n1. {path}: description: required key is missing")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Path.mkdir, "is a directory"),
        (lambda path: path.write_bytes(b"name: caf\xe9"), "it is not UTF-8 text"),
        (Path.absolute, "no such file or directory"),
    ],
)
def test_load_recipe_reports_why_a_file_cannot_be_read(tmp_path: Path, make: Any, reason: str) -> None:
    path = tmp_path / "mine.yaml"
    make(path)
    text = message(name=str(path))
    assert text.startswith(f"recipe '{path}' cannot be read: {reason}")
    assert "`inheritune-ds recipes` lists the shipped ones" in text


SOURCES: list[dict[str, Any]] = [
    {"kind": "embedded"},
    {"kind": "files", "paths": ["on", "a: b.txt", "1e-3"], "document_separator": "\n\n"},
    {"kind": "hub", "dataset": "a/b", "data_files": "*.parquet", "download_gib": 0.5},
]
CHANGES: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "": {"seed": st.integers(0, 2**32 - 1), "description": st.text(min_size=1, max_size=60)},
    "optimizer": {"lr": st.floats(1e-12, 10.0)},
    "schedule": {"min_lr_ratio": st.floats(0.0, 1.0)},
    "training": {
        "duration": st.from_regex(r"[1-9][0-9]{0,5}[KMB]? (steps|tokens|epochs)", fullmatch=True),
        "global_batch_tokens": st.integers(1, 1000).map(lambda windows: windows * 128),
    },
    "corpus": {
        "sources": st.sampled_from(SOURCES).map(lambda source: [source]),
        "tokenizer": st.sampled_from([{"vocab_size": 300}, "gpt2", "no"]),
    },
}


@settings(max_examples=40)
@given(st.fixed_dictionaries({section: st.fixed_dictionaries(keys) for section, keys in CHANGES.items()}))
def test_dump_recipe_is_read_back_equal(changes: dict[str, dict[str, Any]]) -> None:
    document = load_recipe("quickstart").model_dump(mode="json")
    for section, values in changes.items():
        (document[section] if section else document).update(values)
    recipe = validate(Recipe, document, "x")
    again = validate(Recipe, parse_yaml(dump_recipe(recipe), "x"), "x")
    assert again == recipe
    assert again.fingerprint == recipe.fingerprint


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.floats(allow_nan=False),
            st.text(),
            st.lists(st.text(max_size=9)),
        ),
        min_size=1,
    )
)
def test_write_yaml_is_read_back_equal(document: dict[str, Any]) -> None:
    assert parse_yaml(write_yaml(document), "x") == document


def test_dump_recipe_writes_every_default() -> None:
    text = dump_recipe(load_recipe("quickstart"))
    for line in ("  max_grad_norm: 1.0", "  eps: 1e-08", "  keep: 3", "  dtype: float32", "  token_dtype: auto"):
        assert line in text.splitlines()


def test_differences_name_every_changed_key() -> None:
    old = {"a": {"b": 1, "c": math.nan}, "d": [1], "e": "x" * 100}
    new = {"a": {"b": 2, "c": math.nan}, "d": [1, 2], "f": None}
    lines = differences(old, new)
    assert lines[:2] == ["a.b: 1 -> 2", "d: [1] -> [1, 2]"]
    assert lines[2].startswith("e: 'xxx")
    assert lines[2].endswith("... -> None")
    assert len(lines) == 3
    assert differences(old, old) == []


def test_differences_reach_into_lists_of_mappings() -> None:
    old = {"sources": [{"name": "a", "weight": 1}, {"name": "b", "weight": 4.5}]}
    new = {"sources": [{"name": "a", "weight": 1}, {"name": "b", "weight": 4.0}]}
    assert differences(old, new) == ["sources.1.weight: 4.5 -> 4.0"]
    assert differences(old, {"sources": [*new["sources"], {"name": "c"}]}) == [
        "sources.1.weight: 4.5 -> 4.0",
        "sources.2: None -> {'name': 'c'}",
    ]
    assert differences({"betas": [1, 2]}, {"betas": [1, 3]}) == ["betas: [1, 2] -> [1, 3]"]


@pytest.mark.parametrize(
    ("content", "what", "action"),
    [
        ("name: mine\n".encode("utf-16"), "UTF-16 text", "iconv -f UTF-16 -t UTF-8"),
        (gzip.compress(b"name: mine\n", mtime=0), "gzip data", "gzip -d"),
        ("name: mine\n".encode("utf-32"), "UTF-32 text", "iconv -f UTF-32 -t UTF-8"),
    ],
)
def test_load_recipe_names_what_a_file_is(tmp_path: Path, content: bytes, what: str, action: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    text = message(name=str(path))
    assert text.startswith(f"recipe '{path}' cannot be read: it is {what}\n")
    assert action in text


def test_load_recipe_reads_a_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(read_document("quickstart", "recipes")[0], encoding="utf-8-sig")
    assert load_recipe(str(path)) == load_recipe("quickstart")
