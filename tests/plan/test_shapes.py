"""The target's shape, by every way a reference can be named."""

import json
from pathlib import Path
from typing import Any

import pytest

from inheritune_ds.config.loading import load_recipe, read_document
from inheritune_ds.errors import CorpusError, InherituneError, RecipeError, SurgeryError
from inheritune_ds.plan.shapes import target_shape

LLAMA_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 172,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def folder_with(path: Path, config: object) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(path)


def test_target_shape_from_scratch_is_the_recipes_own() -> None:
    recipe = load_recipe("quickstart-reference")
    assert target_shape(recipe) == (recipe.target.shape, 8)


def test_target_shape_of_a_hub_reference_is_cut_to_the_selected_blocks() -> None:
    found = target_shape(load_recipe("openllama-3b-13l"))
    assert found is not None
    assert found[1] == found[0].num_hidden_layers == 13


def test_target_shape_follows_recipes_to_their_targets(tmp_path: Path) -> None:
    middle = tmp_path / "middle.yaml"
    text, _ = read_document("quickstart", "recipes")
    middle.write_text(text.replace("first:4", "first:6").replace("name: quickstart", "name: middle"), encoding="utf-8")
    recipe = load_recipe("quickstart", [f"reference.model=recipe:{middle}", "target.select=first:6"])
    found = target_shape(recipe)
    assert found is not None
    assert found[1] == 6
    with pytest.raises(
        SurgeryError, match=r"first:7: 7 is not possible, the reference has 6 blocks \(recipe:.*middle.yaml\)"
    ):
        target_shape(load_recipe("quickstart", [f"reference.model=recipe:{middle}", "target.select=first:7"]))


def test_target_shape_refuses_recipes_in_a_circle(tmp_path: Path) -> None:
    path = tmp_path / "loop.yaml"
    overrides = [f"reference.model=recipe:{path}"]
    recipe = load_recipe("quickstart", overrides)
    path.write_text(json.dumps(recipe.model_dump(mode="json")), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"in a circle: quickstart -> .*loop.yaml -> .*loop.yaml"):
        target_shape(recipe)


def test_target_shape_reads_a_local_folder(tmp_path: Path) -> None:
    model = folder_with(tmp_path / "model", LLAMA_CONFIG)
    recipe = load_recipe("quickstart", [f"reference.model={model}", "corpus.tokenizer.vocab_size=512"])
    found = target_shape(recipe)
    assert found is not None
    assert (found[1], found[0].num_key_value_heads, found[0].tie_word_embeddings) == (4, 4, True)


def test_target_shape_is_unknown_for_a_hub_id_or_a_family_without_shape(tmp_path: Path) -> None:
    assert target_shape(load_recipe("quickstart", ["reference.model=EleutherAI/pythia-1b"])) is None
    model = folder_with(tmp_path / "neox", {"model_type": "gpt_neox"})
    assert target_shape(load_recipe("quickstart", [f"reference.model={model}"])) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "config.json cannot be read: no such file"),
        ("{", "config.json cannot be read: it is not JSON"),
        ({"model_type": "llama", "vocab_size": 5}, "does not describe a model: key 'hidden_size' is missing"),
        ({**LLAMA_CONFIG, "num_attention_heads": 7}, "does not describe a model: hidden_size 64 is not a multiple"),
        ({**LLAMA_CONFIG, "vocab_size": 0}, "does not describe a model: vocab_size: Input should be greater than 0"),
        ([1], "does not describe a model"),
    ],
)
def test_target_shape_refuses_a_broken_folder(tmp_path: Path, config: object, message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        target_shape(load_recipe("quickstart", [f"reference.model={folder}"]))


@pytest.mark.parametrize(
    ("overrides", "kind", "message"),
    [
        (
            ["target.select=first:9"],
            SurgeryError,
            "select first:9: 9 is not possible, the reference has 8 blocks (recipe:quickstart-reference)",
        ),
        (
            ["training.seq_len=256"],
            RecipeError,
            "training.seq_len 256 is more than the model's 128 positions",
        ),
        (
            ["corpus.tokenizer.vocab_size=5000"],
            CorpusError,
            "corpus.tokenizer.vocab_size 5000 is more than the 4096 entries of the model's vocabulary",
        ),
        (
            ["corpus.tokenizer.vocab_size=70000", "corpus.token_dtype=uint16"],
            CorpusError,
            "token_dtype uint16 holds 65536 values, but corpus.tokenizer.vocab_size is 70000",
        ),
    ],
)
def test_target_shape_refuses_sizes_that_do_not_fit(
    overrides: list[str], kind: type[InherituneError], message: str
) -> None:
    with pytest.raises(kind) as caught:
        target_shape(load_recipe("quickstart", overrides))
    assert message in str(caught.value)
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("scores", "error", "problem"),
    [
        (None, SurgeryError, "no scores named 'rank' were given"),
        ({"mass": [1, 2, 3, 4, 5]}, SurgeryError, "no scores named 'rank' were given"),
        ({"rank": [1, 2, 3, 4]}, SurgeryError, "4 scores named 'rank', but the reference has 5 blocks"),
        ({"rank": "high"}, RecipeError, "does not hold scores"),
    ],
    ids=["none", "others", "short", "no scores"],
)
@pytest.mark.parametrize("known", ["shape", "no shape"])
def test_scores_are_checked_before_a_run(
    known: str, scores: Any, error: type[InherituneError], problem: str, tmp_path: Path
) -> None:
    config = LLAMA_CONFIG if known == "shape" else {**LLAMA_CONFIG, "model_type": "other"}
    words = [f"reference.model={folder_with(tmp_path / 'model', config)}", "target.select=by:rank:2"]
    if scores is not None:
        (tmp_path / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
        words.append(f"target.block_scores={tmp_path / 'scores.json'}")
    recipe = load_recipe("quickstart", words)
    if known == "no shape" and problem.startswith("4 scores"):
        assert target_shape(recipe) is None  # how many blocks there are is not known yet
    else:
        with pytest.raises(error, match=problem):
            target_shape(recipe)


def test_scores_choose_as_many_blocks_as_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text('{"rank": [1, 2, 3, 4, 5]}', encoding="utf-8")
    model = folder_with(tmp_path / "model", {**LLAMA_CONFIG, "vocab_size": 4096})
    words = [f"reference.model={model}", "target.select=by:rank:2", f"target.block_scores={tmp_path / 'scores.json'}"]
    found = target_shape(load_recipe("quickstart", words))
    assert found is not None
    assert found[1] == 2
