"""A recipe's cost as one set of figures, and the verdict on a published claim."""

from typing import Any

import pytest

from inheritune_ds.config.loading import load_recipe
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.config.training import Checkpointing
from inheritune_ds.errors import RecipeError
from inheritune_ds.plan.budget import Budget, Tokens, build_budget, checkpoints_staying
from inheritune_ds.plan.claims import amount, check_claim, short_count
from inheritune_ds.plan.model_size import GIB
from inheritune_ds.plan.shapes import target_shape

ONE_BILLION = Tokens((1_000_000_000,), estimate=True)


def ds_config(micro_batch_size: int = 2, accumulation: int = 32, **changes: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 1},
        **changes,
    }


def budget_of(recipe: Recipe, unique: Tokens | None = ONE_BILLION, **changes: Any) -> Budget:
    return build_budget(recipe, ds_config(**changes), shape=target_shape(recipe), unique=unique, world_size=1)


def test_budget_of_the_paper() -> None:
    budget = budget_of(load_recipe("openllama-3b-13l"))
    assert budget.parameters is not None
    assert budget.parameters.total == 1_815_638_400
    assert (budget.steps, budget.tokens_seen) == (61_035, 61_035 * 131_072)
    assert budget.epochs == pytest.approx(8.0, abs=1e-3)
    assert budget.flops == pytest.approx(61_035 * 131_072 * 11.3017728e9)
    assert budget.checkpoint_bytes == 12 * 1_815_638_400
    assert budget.download_gib == {
        "openlm-research/open_llama_3b": 6.4,
        "togethercomputer/RedPajama-Data-1T-Sample": 4.7,
    }
    disk = dict(budget.disk_gib)
    assert disk.pop("checkpoints (2 kept, 2 in hand)") == pytest.approx(4 * 21.79e9 / GIB, rel=1e-3)
    assert disk.pop("target before training (fp32; less in the reference's own type)") == pytest.approx(6.76, abs=0.01)
    assert disk.pop("export") == pytest.approx(4 * 1_815_638_400 / GIB)
    assert disk.pop("token files") == pytest.approx(1e9 / 0.99 * 2 / GIB)
    assert disk == {"download": pytest.approx(11.1)}


@pytest.mark.parametrize(
    ("keep", "keep_every", "steps", "staying"),
    [
        (3, None, 100, 3),
        (100_000, None, 30, 3),
        (100_000, None, 31, 4),  # the last one is saved at the end, between two intervals
        (1, 1, 100, 10),
        (2, 3, 100, 5),  # 30, 60, 90, and the two newest
        (2, 3, 25, 2),
        (2, 3, None, 2),
    ],
)
def test_the_most_checkpoints_that_stay_at_once(
    keep: int, keep_every: int | None, steps: int | None, staying: int
) -> None:
    rule = Checkpointing(interval_steps=10, keep=keep, keep_every=keep_every)
    assert checkpoints_staying(rule, steps) == staying


@pytest.mark.parametrize(
    ("duration", "rule", "part"),
    [
        ("240 steps", ["keep=1", "keep_every=1", "interval_steps=40"], "checkpoints (6 kept, 2 in hand)"),
        ("240 steps", ["keep=100000"], "checkpoints (2 kept, 2 in hand)"),
        ("2 epochs", ["keep=5"], "checkpoints (5 kept, 2 in hand)"),
        ("2 epochs", ["keep=5", "keep_every=2"], "checkpoints (at least 5 kept, 2 in hand)"),
    ],
)
def test_budget_has_room_for_the_checkpoints_that_stay(duration: str, rule: list[str], part: str) -> None:
    changes = [f"training.duration={duration}", *(f"checkpoint.{change}" for change in rule)]
    budget = budget_of(load_recipe("quickstart", changes), unique=None)
    kept = int(part.partition(" kept")[0].split("(")[1].removeprefix("at least "))
    assert budget.checkpoint_bytes is not None
    assert budget.disk_gib[part] == pytest.approx((kept + 2) * budget.checkpoint_bytes / GIB)


def test_budget_of_an_unknown_model_has_no_figures() -> None:
    recipe = load_recipe("quickstart", ["reference.model=EleutherAI/pythia-160m", "training.duration=2 epochs"])
    budget = budget_of(recipe, unique=None)
    unknown = (budget.parameters, budget.steps, budget.tokens_seen, budget.epochs, budget.flops, budget.memory)
    assert unknown == (None,) * 6
    assert budget.download_gib == {"EleutherAI/pythia-160m": None}
    assert budget.tokens_a_step == 2048


def test_budget_counts_epochs_of_a_run_in_steps() -> None:
    budget = budget_of(load_recipe("quickstart"), unique=Tokens((245_761,), estimate=False))
    assert budget.epochs == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("overrides", "token_bytes"),
    [
        ([], 2),
        (["corpus.token_dtype=uint32"], 4),
        (["corpus.tokenizer.vocab_size=70000", "reference.model=a/b"], 4),
        (["corpus.tokenizer=a/b"], 2),
    ],
)
def test_budget_token_files_follow_the_integer_type(overrides: list[str], token_bytes: int) -> None:
    budget = budget_of(load_recipe("quickstart", overrides), unique=Tokens((900,), estimate=False))
    assert budget.disk_gib["token files"] * GIB == pytest.approx(1000 * token_bytes)


def test_budget_export_follows_its_type() -> None:
    wide, narrow = (budget_of(load_recipe("quickstart", [f"export.dtype={t}"])) for t in ("float32", "bfloat16"))
    assert wide.disk_gib["export"] == 2 * narrow.disk_gib["export"]


@pytest.mark.parametrize(
    ("overrides", "recomputation", "gflop"),
    [
        # 6 FLOPs for each of 1,713,235,200 parameters; 12 x 13 x 3200 for each position that is attended to
        ([], "none", 10.2794112 + 499_200 * 2049 / 2e9),
        (["training.seq_len=1024"], "none", 10.2794112 + 499_200 * 1025 / 2e9),
        (["training.packing=documents"], "none", 10.2794112),
        ([], "full", 10.2794112 + 2 * 1.6108352 + (499_200 + 166_400) * 2049 / 2e9),
    ],
)
def test_floor_counts_the_positions_that_a_token_must_attend_to(
    overrides: list[str], recomputation: Any, gflop: float
) -> None:
    budget = budget_of(load_recipe("openllama-3b-13l", [*overrides, "training.duration=1000 steps"]))
    assert budget.floor_flops(recomputation) == pytest.approx(1000 * 131_072 * gflop * 1e9, rel=1e-9)


@pytest.mark.parametrize(
    ("override", "texts"),
    [
        (
            "published_claim.gpus=1",
            [
                '8B tokens cannot fit the "under 12 hours on one A6000" of the paper',
                "the floor is 154.9 hours at 100 % of the peak of 1 x RTX A6000 (154.8 TFLOP/s), 324.5 hours at",
                "12 hours would need an MFU of 1352 %",
            ],
        ),
        ("published_claim.hours=154", ["8B tokens cannot fit the"]),
        (
            "published_claim.hours=156",
            ["8B tokens can hardly fit the", "would need an MFU of 104 % (MFU counts attention in"],
        ),
        ("published_claim.hours=170", ["8B tokens can hardly fit the"]),
        ("published_claim.hours=300", ["8B tokens can fit the"]),
        ("published_claim.gpus=4", ["the floor is 38.7 hours at 100 % of the peak of 4 x RTX A6000"]),
    ],
)
def test_claim_is_compared_with_the_floor(override: str, texts: list[str]) -> None:
    recipe = load_recipe("openllama-3b-13l", [override])
    found = check_claim(budget_of(recipe)) or ""
    assert all(text in found for text in texts)


def test_claim_is_silent_without_one_and_open_without_flops() -> None:
    assert check_claim(budget_of(load_recipe("quickstart"))) is None
    epochs = load_recipe("openllama-3b-13l", ["training.duration=8 epochs"])
    assert "cannot be checked" in str(check_claim(budget_of(epochs, unique=None)))


def test_claim_on_an_unknown_gpu_is_refused() -> None:
    recipe = load_recipe("openllama-3b-13l", ["published_claim.gpu=a600"])
    with pytest.raises(RecipeError, match="did you mean a6000"):
        check_claim(budget_of(recipe))


def test_amount_is_the_duration_as_text() -> None:
    recipe = load_recipe("openllama-3b-13l", ["training.duration=8 epochs"])
    assert amount(recipe, ONE_BILLION) == "8 epochs of 1B tokens"
    assert amount(recipe, None) == "8 epochs"
    assert amount(load_recipe("openllama-3b-13l-250m"), ONE_BILLION) == "250M tokens"


@pytest.mark.parametrize(
    ("count", "text"),
    [(1_815_638_400, "1.816B"), (1e9, "1B"), (123_910_400, "123.9M"), (791_552, "791,552"), (0, "0")],
)
def test_short_count_keeps_four_digits(count: float, text: str) -> None:
    assert short_count(count) == text
