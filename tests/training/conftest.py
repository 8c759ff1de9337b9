"""Fixtures of the training wing: resolving a DeepSpeed config against a small recipe."""

from collections.abc import Callable
from typing import Any

import pytest

from inheritune_ds.recipe import Recipe, Shape
from inheritune_ds.recipe_file import load_recipe
from inheritune_ds.training.ds_config import Machine, Resolved, resolve

A6000 = Machine(kind="cuda", memory_gib=48.0, bf16=True)


@pytest.fixture
def wide() -> Shape:
    """A model of which a few GiB hold some windows, but not all."""
    return Shape(
        model_type="llama",
        vocab_size=32000,
        hidden_size=768,
        num_hidden_layers=4,
        num_attention_heads=12,
        intermediate_size=2048,
        max_position_embeddings=2048,
    )


@pytest.fixture
def recipe() -> Recipe:
    """quickstart's numbers, each of the optimizer's its own: 32 windows of 128 tokens a step."""
    numbers = ["lr=4e-4", "betas=[0.8, 0.9]", "eps=1e-7", "weight_decay=0.2", "max_grad_norm=0.5"]
    batch = ["training.seq_len=128", "training.global_batch_tokens=4096"]
    return load_recipe("quickstart", [*batch, *(f"optimizer.{number}" for number in numbers)])


@pytest.fixture
def resolved(recipe: Recipe, wide: Shape) -> Callable[..., Resolved]:
    def make(document: dict[str, Any], *, machine: Machine = A6000, world_size: int = 1, **options: Any) -> Resolved:
        return resolve(
            document,
            options.get("recipe", recipe),
            origin="ds.json",
            shape=options.get("shape", (wide, 4)),
            world_size=world_size,
            machine=machine,
        )

    return make
