"""Fixtures that start real runs on a generated corpus."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import launching, tiny
from tests.launching import Process
from tests.warm_python import WarmPython


@pytest.fixture
def start(warm: WarmPython, tmp_path: Path) -> Callable[..., Process]:
    return partial(launching.start, warm, tmp_path)


@pytest.fixture
def launch(warm: WarmPython, tmp_path: Path) -> Callable[..., str]:
    return partial(launching.launch, warm, tmp_path)


@pytest.fixture
def tiny_recipe(tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe that trains in seconds; keyword arguments replace whole sections."""
    corpus = tiny.write_corpus(tmp_path / "corpus.jsonl")
    sources = [{"kind": "files", "paths": [str(corpus)]}]

    def write(name: str = "tiny", **sections: Any) -> Path:
        recipe = tiny.document(
            **{
                "name": name,
                "target": {"shape": {**tiny.LLAMA, "vocab_size": 300, "num_hidden_layers": 4}},
                "corpus": {"sources": sources, "tokenizer": {"vocab_size": 300}, "validation_ratio": 0.1},
                "training": {"seq_len": 32, "global_batch_tokens": 512, "duration": "12 steps"},
                "schedule": {"kind": "cosine", "warmup_steps": 2},
                "validation": {"interval_steps": 6, "max_tokens": 1024},
                "checkpoint": {"interval_steps": 4},
                "logging": {"interval_steps": 1},
                **sections,
            }
        )
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
        return path

    return write
