"""Fixtures of the surgery wing: tiny models, saved references, targets cut from them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inheritune_ds.surgery.inherit import TargetModel
from tests.surgery import tiny


@pytest.fixture
def reference_folder(tmp_path: Path) -> Callable[..., Path]:
    """Save a tiny model as a Hugging Face folder."""

    def make(family: str, **changes: Any) -> Path:
        folder = tmp_path / f"reference-{family}"
        model = tiny.make_model(family, **changes)
        assert model.generation_config is not None
        model.generation_config.repetition_penalty = 1.25  # to be found again in the target
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def folder(reference_folder: Callable[..., Path]) -> Path:
    """A tiny LLaMA as a Hugging Face folder."""
    return reference_folder("llama")


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., TargetModel]:
    """Build a target from a saved reference; `folder=None` is from scratch."""

    def make(folder: Path | None, *, to: str = "target", **options: Any) -> TargetModel:
        return tiny.cut(folder, tmp_path / to, **options)

    return make
