"""Fixtures of the surgery wing: tiny models of several families, every tensor random, and a tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from inheritune_ds.recipe import Reference, Target
from inheritune_ds.surgery.inherit import TargetModel, build_target
from inheritune_ds.surgery.reference import load_config, locate

VOCABULARY = 40
IDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
FAMILIES: dict[str, dict[str, Any]] = {
    # scale_attn_by_inverse_layer_idx makes a block's number count, as in the paper's GPT-2 track
    "gpt2": {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 32, "scale_attn_by_inverse_layer_idx": True},
    "llama": {**WIDE, "num_key_value_heads": 1},
    # the last two blocks look 4 tokens back only
    "qwen2": {
        **WIDE,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 2,
        "num_key_value_heads": 2,
    },
    # every fourth block has no rotary embedding
    "smollm3": {**WIDE, "num_key_value_heads": 1},
    "opt": {**WIDE, "ffn_dim": 24, "word_embed_proj_dim": 8},
    "gpt_neox": WIDE,
}
IDENTITY = {"recipe": "one"}
TIED = {"gpt2", "qwen2", "smollm3", "opt"}


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """Make a tiny model in which no tensor has an initial value (a norm of ones says nothing)."""

    def make(family: str, *, seed: int = 5, dtype: str = "float32", **changes: Any) -> PreTrainedModel:
        values = {**IDS, **FAMILIES[family], "tie_word_embeddings": family in TIED, **changes}
        config = AutoConfig.for_model(family, **values)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
        model.eval()
        return model

    return make


@pytest.fixture
def reference_folder(tmp_path: Path, make_model: Callable[..., PreTrainedModel]) -> Callable[..., Path]:
    """Save a tiny model as a Hugging Face folder."""

    def make(family: str, **changes: Any) -> Path:
        folder = tmp_path / f"reference-{family}"
        model = make_model(family, **changes)
        assert model.generation_config is not None
        model.generation_config.repetition_penalty = 1.25  # to be found again in the target
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def make_tokenizer() -> Callable[[int], PreTrainedTokenizerFast]:
    """Make a tokenizer of so many words."""

    def make(size: int) -> PreTrainedTokenizerFast:
        special = ["<pad>", "<s>", "</s>", "<unk>"]
        words = special + [f"w{number}" for number in range(size - len(special))]
        model = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
        model.pre_tokenizer = Whitespace()
        return PreTrainedTokenizerFast(
            tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )

    return make


@pytest.fixture
def build(tmp_path: Path, make_tokenizer: Callable[[int], Any]) -> Callable[..., TargetModel]:
    """Build a target from a saved reference; `folder=None` is from scratch."""

    def make(folder: Path | None, *, to: str = "target", seed: int = 1, words: int = 40, **target: Any) -> TargetModel:
        part = Target(**target)
        located = locate(Reference(model=str(folder)), Path) if folder else None
        return build_target(
            part,
            reference=None if part.inherits_nothing else located,
            reference_config=load_config(folder) if folder else None,
            tokenizer=make_tokenizer(words),
            seed=seed,
            folder=tmp_path / to,
            identity=IDENTITY,
            command="make it",
            say=lambda line: None,
        )

    return make
