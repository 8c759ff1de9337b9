import json
from pathlib import Path

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from inheritune_ds.config.deepspeed import Machine, Resolved
from inheritune_ds.config.deepspeed_checks import read
from inheritune_ds.config.loading import DEFAULT_RECIPE, differences, load_recipe, read_document, shipped_names
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.config.zero import read_layout
from inheritune_ds.plan.duration import steps_in
from inheritune_ds.plan.gpus import gpu
from inheritune_ds.plan.memory import largest_micro_batch
from inheritune_ds.plan.micro_batch import resolve_for
from inheritune_ds.plan.model_size import parameters
from inheritune_ds.plan.shapes import target_shape

CONFIGS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
NAMES = [
    "gpt2-medium-16l",
    "gpt2-medium-24l",
    "openllama-3b-13l",
    "openllama-3b-13l-250m",
    "quickstart",
    "quickstart-reference",
    "quickstart-scratch",
]
A6000 = Machine(kind="cuda", memory_gib=48.0, bf16=True)


def test_shipped_recipes_are_those_of_the_documentation() -> None:
    assert shipped_names() == NAMES
    assert DEFAULT_RECIPE in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_named_as_its_file_and_fits_its_target(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert target_shape(recipe) is not None
    assert len(recipe.description) <= 97  # `description: ` and 97 characters: the width of the plan


@pytest.mark.parametrize("name", NAMES)
def test_recipe_file_is_narrow_and_comments_its_numbers(name: str) -> None:
    text, _ = read_document(name, "recipes")
    assert max(map(len, text.splitlines())) <= 120
    batch = next(line for line in text.splitlines() if "global_batch_tokens" in line)
    assert "windows" in batch.partition("#")[2]


@pytest.mark.parametrize(
    ("name", "total", "blocks", "steps", "windows"),
    [
        ("quickstart-reference", 2_631_808, 8, 240, 16),
        ("quickstart", 1_840_256, 4, 240, 16),
        ("quickstart-scratch", 1_840_256, 4, 240, 16),
        ("openllama-3b-13l", 1_815_638_400, 13, 61_035, 64),
        ("openllama-3b-13l-250m", 1_815_638_400, 13, 1_907, 64),
        ("gpt2-medium-24l", 354_871_296, 24, 100_000, 384),
        ("gpt2-medium-16l", 254_101_504, 16, 100_000, 384),
    ],
)
def test_recipe_has_the_numbers_of_its_comments(name: str, total: int, blocks: int, steps: int, windows: int) -> None:
    recipe = load_recipe(name)
    found = target_shape(recipe)
    assert found is not None
    assert found[1] == blocks
    assert parameters(*found).total == total
    assert steps_in(recipe.training, None) == steps
    assert recipe.training.batch_windows == windows
    assert recipe.schedule.warmup_steps <= steps // 10


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("quickstart")])
def test_full_size_recipe_validates_on_four_million_tokens(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.validation.max_tokens >= 4_000_000
    unique = recipe.corpus.max_tokens or 9_035_582_198
    assert unique * recipe.corpus.validation_ratio > recipe.validation.max_tokens


@pytest.mark.parametrize(
    ("first", "second", "keys"),
    [
        ("quickstart", "quickstart-scratch", {"target.inherit"}),
        ("quickstart", "quickstart-reference", {"reference", "target.select", "target.shape"}),
        ("gpt2-medium-24l", "gpt2-medium-16l", {"reference", "target.select", "target.shape"}),
        (
            "openllama-3b-13l",
            "openllama-3b-13l-250m",
            {"published_claim", "schedule.warmup_steps", "training.duration", "validation.interval_steps"},
        ),
    ],
)
def test_related_recipes_differ_only_in_these_keys(first: str, second: str, keys: set[str]) -> None:
    old, new = (load_recipe(name).model_dump(mode="json") for name in (first, second))
    changed = differences(old, new)
    assert {line.partition(":")[0] for line in changed} == {"description", "name"} | keys


def test_recipes_have_the_paper_s_settings() -> None:
    llama, medium = load_recipe("openllama-3b-13l"), load_recipe("gpt2-medium-24l")
    assert (llama.optimizer.lr, llama.optimizer.weight_decay, llama.schedule.warmup_steps) == (3e-4, 0.1, 1000)
    assert (llama.schedule.kind, llama.corpus.max_tokens) == ("cosine", 10**9)
    assert str(llama.training.duration) == "8B tokens"
    assert llama.published_claim is not None
    assert (llama.published_claim.hours, llama.published_claim.gpu) == (12, "a6000")
    assert medium.optimizer.lr * medium.schedule.min_lr_ratio == pytest.approx(1e-5)
    assert medium.target.shape is not None
    assert medium.target.shape.scale_attn_by_inverse_layer_idx


def test_ds_configs_are_those_of_the_documentation() -> None:
    assert [path.stem for path in CONFIGS] == ["a6000", "cpu", "zero1", "zero2", "zero3", "zero3_offload"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_ds_config_is_plain_deepspeed_json(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping"):
        assert config[key] == "auto"
    assert config["optimizer"]["type"] == "AdamW"
    assert set(config["optimizer"]["params"].values()) == {"auto"}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    zero = {key: value for key, value in config["zero_optimization"].items() if value != "auto"}
    assert DeepSpeedZeroConfig(**zero).stage == config["zero_optimization"]["stage"]


def resolved_for(recipe: Recipe, config: str, machine: Machine) -> Resolved:
    path = next(path for path in CONFIGS if path.stem == config)
    return resolve_for(recipe, read(path), config, world_size=1, machine=machine)


def test_a6000_config_holds_the_largest_micro_batch_of_the_paper_s_model() -> None:
    recipe = load_recipe("openllama-3b-13l")
    config = resolved_for(recipe, "a6000", A6000).config
    found = target_shape(recipe)
    assert found is not None
    largest = largest_micro_batch(
        *found,
        memory_gib=gpu("a6000").memory_gib,
        batch_windows=recipe.training.batch_windows,
        **read_layout(config, seq_len=recipe.training.seq_len, world_size=1),
    )
    assert config["train_micro_batch_size_per_gpu"] == largest == 2


@pytest.mark.parametrize(("bf16", "precision"), [(True, "bf16"), (False, "fp32")])
def test_cpu_config_computes_in_bf16_where_the_cpu_can(bf16: bool, precision: str) -> None:  # noqa: FBT001
    machine = Machine(kind="cpu", memory_gib=16.0, bf16=bf16)
    resolved = resolved_for(load_recipe("quickstart"), "cpu", machine)
    assert (resolved.precision, resolved.micro_batch_size) == (precision, 16)
