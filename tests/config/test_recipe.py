import re
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import AutoConfig

from inheritune_ds.config.fields import Duration, is_local_path
from inheritune_ds.config.loading import load_recipe
from inheritune_ds.config.model import Reference, Shape, Target
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.config.training import Training
from inheritune_ds.errors import RecipeError
from inheritune_ds.plan.shapes import shape_from_config

GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 100,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
}
COMMON = set(GPT2) - {"model_type", "tie_word_embeddings"}
LLAMA: dict[str, Any] = {**GPT2, "model_type": "llama", "tie_word_embeddings": False, "intermediate_size": 16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 9}, "hidden_size 9 is not a multiple of num_attention_heads 2"),
        ({"model_type": "llama"}, "intermediate_size is required for model_type llama"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be true for model_type gpt2"),
        (
            {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 3},
            "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
        ),
    ],
)
def test_shape_refuses_impossible_sizes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Shape(**{**GPT2, **changes})


def training(duration: str, batch: int = 8) -> Training:
    return Training.model_validate({"seq_len": 4, "global_batch_tokens": batch, "duration": duration})


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("8 epochs", 8, "epochs"),
        ("100_000 steps", 100_000, "steps"),
        ("250M tokens", 250_000_000, "tokens"),
        ("1K steps", 1_000, "steps"),
        ("2B tokens", 2_000_000_000, "tokens"),
    ],
)
def test_duration_is_an_amount_and_a_unit_and_keeps_its_spelling(text: str, amount: int, unit: str) -> None:
    found = training(text)
    assert found.duration == Duration(amount, unit, text)
    assert found.model_dump(mode="json")["duration"] == str(found.duration) == text
    assert Training.model_validate(found.model_dump()) == found


@pytest.mark.parametrize(
    "duration",
    ["8", "8 weeks", "-1 steps", "1.5 epochs", "8  epochs", "8 epochs ", "8 epochs\n", "M tokens", "0_0 steps"],
)
def test_duration_of_nothing_or_another_form_is_refused(duration: str) -> None:
    with pytest.raises(ValidationError, match="must be at least 1" if duration.startswith("0") else "Value error"):
        training(duration)


def test_batch_is_a_multiple_of_windows_and_the_nearest_are_suggested() -> None:
    assert training("1 steps", batch=12).batch_windows == 3
    with pytest.raises(ValidationError, match="10 is not a multiple of seq_len 4; the nearest are 8, 12"):
        training("1 steps", batch=10)
    with pytest.raises(ValidationError, match=r"3 is not a multiple of seq_len 4; the nearest are 4 "):
        training("1 steps", batch=3)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("quickstart", ["reference="], "give a reference and target.select, or target.shape (from scratch)"),
        ("quickstart-reference", ["target.select=first:2"], "target.select needs a reference to select from"),
        ("quickstart-reference", ["corpus.tokenizer="], "corpus.tokenizer is required without a reference"),
        ("quickstart", [f"target.shape={GPT2}"], "target.shape is for training from scratch: it excludes reference"),
        ("quickstart", ["target.select="], "target.select is required with a reference, such as first:4"),
        ("quickstart", [f"reference.shape={GPT2}"], "shape is owned by recipe:quickstart-reference: remove it here"),
    ],
)
def test_recipe_refuses_contradictions(name: str, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(name, [override.replace("True", "true") for override in overrides])


def test_reference_and_inheritance_are_derived_from_their_texts() -> None:
    recipe = load_recipe("quickstart")
    assert (recipe.target.select, recipe.target.inherits_nothing) == ("first:4", False)
    assert recipe.reference is not None
    assert recipe.reference.recipe_name == "quickstart-reference"
    hub = load_recipe("openllama-3b-13l").reference
    assert hub is not None
    assert hub.recipe_name is None
    assert load_recipe("quickstart-scratch").target.inherits_nothing


def test_fingerprint_depends_only_on_keys_that_determine_the_numbers() -> None:
    base = load_recipe("quickstart").fingerprint
    assert re.fullmatch("[0-9a-f]{64}", base)
    for same in ("name=x", "description=y", "logging.interval_steps=3", "checkpoint.keep=1", "seed=1337"):
        assert load_recipe("quickstart", [same]).fingerprint == base
    for other in ("seed=1", "optimizer.lr=2e-3", "target.inherit=none", "corpus.validation_ratio=0.2"):
        assert load_recipe("quickstart", [other]).fingerprint != base


def test_recipe_cannot_be_changed() -> None:
    recipe = load_recipe("quickstart")
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 3
    assert isinstance(recipe, Recipe)


@pytest.mark.parametrize("shape", [Shape(**GPT2), Shape(**{**GPT2, "intermediate_size": 20}), Shape(**LLAMA)])
def test_shape_from_config_reads_a_config_of_transformers(shape: Shape) -> None:
    own = shape.model_dump(include=COMMON) | {"bos_token_id": 0, "eos_token_id": 0}
    if shape.model_type == "gpt2":
        own["n_inner"] = shape.intermediate_size
    else:
        own |= {"intermediate_size": shape.intermediate_size, "tie_word_embeddings": False, "rms_norm_eps": 1e-6}
    config = AutoConfig.for_model(shape.model_type, **own).to_dict()
    read = shape_from_config(config)
    assert read is not None
    expected = shape.model_dump()
    if shape.model_type == "llama":  # transformers writes the default out
        expected["num_key_value_heads"] = shape.num_attention_heads
    assert read.model_dump() == expected


def test_shape_from_config_reads_old_and_new_spellings_of_rope() -> None:
    old = {**LLAMA, "rope_theta": 500_000}
    new = {**LLAMA, "rope_parameters": {"rope_theta": 250_000.0, "rope_type": "default"}}
    thetas = [shape.rope_theta for shape in map(shape_from_config, (LLAMA, old, new)) if shape]
    assert thetas == [10_000.0, 500_000.0, 250_000.0]


def test_shape_from_config_knows_two_families() -> None:
    assert shape_from_config({"model_type": "mamba"}) is None
    assert shape_from_config({}) is None


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("openlm-research/open_llama_3b", False),
        ("gpt2", False),
        ("./model", True),
        ("../model", True),
        ("~/model", True),
        ("/models/a", True),
        ("runs/a/export", True),
    ],
)
def test_is_local_path_depends_on_the_spelling(name: str, *, local: bool) -> None:
    assert is_local_path(name) is local


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("R/llama/", "R/llama"),
        ("R//llama", "R/llama"),
        ("./R/./llama/.", "./R/llama"),
        ("/", "/"),
        ("../m/", "../m"),
        ("~/m/", "~/m"),
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("recipe:a//b.yaml", "recipe:a//b.yaml"),
    ],
)
def test_a_folder_has_one_spelling(written: str, plain: str) -> None:
    assert Reference(model=written).model == plain


@pytest.mark.parametrize("model", ["recipe:quickstart", "/models/llama", "./llama", "~/llama"])
def test_a_revision_is_for_the_hub(model: str) -> None:
    with pytest.raises(ValidationError, match=f"revision v1 is for models of the hub: remove it for {model}"):
        Reference(model=model, revision="v1")
    assert Reference(model="openai-community/gpt2", revision="v1").revision == "v1"


def test_select_accepts_a_list_of_one_block_as_a_number() -> None:
    recipe = load_recipe("quickstart", ["target.select=3"])
    assert recipe.target.select == "3"
    for select in (True, 1.5, -3):
        with pytest.raises(ValidationError):
            Target.model_validate({"select": select})


@pytest.mark.parametrize("select", ["first:2", "0-3", None])
def test_scores_need_a_selection_by_scores(select: str | None) -> None:
    with pytest.raises(ValidationError, match="block_scores is for select: by:NAME:n: remove it"):
        Target(select=select, block_scores="scores.json")
    assert Target(select="by:rank:2", block_scores="scores.json").block_scores
