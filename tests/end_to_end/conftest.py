"""Fixtures that start real runs, on a corpus of our own making."""

import json
import random
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.launching import ROOT, environment, launcher_line

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
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start a script under a launcher; every process is in a group of its own."""

    def start_run(
        script: str, arguments: Sequence[str], *, launcher: str = "python", ranks: int = 1, **extra: str
    ) -> subprocess.Popen[str]:
        log = (tmp_path / "run.log").open("a", encoding="utf-8")
        with log:
            return subprocess.Popen(
                [*launcher_line(launcher, ranks), str(ROOT / script), *arguments],
                cwd=tmp_path,
                env=environment(**extra),
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    return start_run


@pytest.fixture
def launch(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> Callable[..., str]:
    """Run a script to its end; return what it printed. A wrong exit code fails the test with the output."""

    def launch_run(script: str, *arguments: str, expect: int = 0, **how: Any) -> str:
        before = len((tmp_path / "run.log").read_text(encoding="utf-8")) if (tmp_path / "run.log").exists() else 0
        process = start(script, arguments, **how)
        code = process.wait(timeout=300)  # the first start of all builds a C++ operator; pytest ends a test that hangs
        output = (tmp_path / "run.log").read_text(encoding="utf-8")[before:]
        assert code == expect, output[-6000:]
        return output

    return launch_run


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
