"""Fixtures that start real runs, on a corpus of our own making."""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import launching
from tests.launching import Process
from tests.warm_python import WarmPython

WORDS = (
    "the",
    "a",
    "small",
    "old",
    "red",
    "cat",
    "dog",
    "bird",
    "tree",
    "river",
    "runs",
    "sees",
    "eats",
    "finds",
    "often",
)


@pytest.fixture
def start(warm: WarmPython, tmp_path: Path) -> Callable[..., Process]:
    """`launching.start` in the test's folder."""
    return partial(launching.start, warm, tmp_path)


@pytest.fixture
def launch(warm: WarmPython, tmp_path: Path) -> Callable[..., str]:
    """`launching.launch` in the test's folder."""
    return partial(launching.launch, warm, tmp_path)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """400 documents of a few hundred words each, from a small grammar with a fixed seed."""
    draw = random.Random(5)
    path = tmp_path / "corpus.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(400):
            text = " ".join(draw.choice(WORDS) for _ in range(draw.randint(50, 150)))
            file.write(json.dumps({"text": f"Story {number}. {text}."}) + "\n")
    return path


@pytest.fixture
def tiny_recipe(tmp_path: Path, corpus: Path) -> Callable[..., Path]:
    """Write a recipe that trains in seconds; keyword arguments replace whole sections."""

    def write(name: str = "tiny", **sections: Any) -> Path:
        shape = {
            "model_type": "llama",
            "vocab_size": 300,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 32,
        }
        recipe = {
            "name": name,
            "description": "a test",
            "target": {"shape": shape},
            "corpus": {
                "sources": [{"kind": "files", "paths": [str(corpus)]}],
                "tokenizer": {"vocab_size": 300},
                "validation_ratio": 0.1,
            },
            "training": {"seq_len": 32, "global_batch_tokens": 512, "duration": "12 steps"},
            "optimizer": {"lr": 0.003},
            "schedule": {"kind": "cosine", "warmup_steps": 2},
            "validation": {"interval_steps": 6, "max_tokens": 1024},
            "checkpoint": {"interval_steps": 4},
            "logging": {"interval_steps": 1},
            **sections,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
        return path

    return write
