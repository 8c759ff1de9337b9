"""Cuts and exports carry the names of transformers 4 beside those of version 5, which reads them as before."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from inheritune_ds.surgery.older_names import rename_tokenizer, save_config, save_tokenizer
from tests.surgery.families import tiny_config
from tests.surgery.tiny import make_tokenizer

THETA = {"rope_type": "default", "rope_theta": 5e5}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
BOTH = {"full_attention": {**LINEAR, "rope_theta": 7e5}, "sliding_attention": {**THETA, "rope_theta": 3e4}}
OLDER: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", THETA, {"rope_theta": 5e5, "rope_scaling": None}),
    ("llama", {**LLAMA_3, "rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": LLAMA_3}),
    (
        "mistral",
        {**YARN, "original_max_position_embeddings": 64},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    ),
    ("qwen2", LINEAR, {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ("phi3", {**LONG, "rope_theta": 2e4}, {"rope_scaling": {**LONG, "type": "longrope", "rope_type": None}}),
    ("stablelm", {**THETA, "partial_rotary_factor": 0.5}, {"rope_theta": 5e5, "partial_rotary_factor": 0.5}),
    (
        "gpt_neox",
        {**THETA, "partial_rotary_factor": 0.5},
        {"rotary_emb_base": 5e5, "rotary_pct": 0.5, "rope_theta": None},
    ),
    ("gemma3_text", BOTH, {"rope_theta": 7e5, "rope_local_base_freq": 3e4}),
    ("modernbert-decoder", BOTH, {"global_rope_theta": 7e5, "local_rope_theta": 3e4}),
    ("olmo3", BOTH, {"rope_theta": 7e5}),
    ("bailing_hybrid", LINEAR, {"rope_scaling": None}),  # no transformers 4 has it
    ("gpt2", {}, {"rope_theta": None, "rope_scaling": None}),
]


def with_rope(family: str, rope: dict[str, Any]) -> PreTrainedConfig:
    config = tiny_config(family)
    values = {**config.to_dict(), "dtype": "bfloat16"}
    return type(config).from_dict(values | ({"rope_parameters": rope} if rope else {}))


@pytest.mark.parametrize(("family", "rope", "older"), OLDER)
def test_config_has_both_names_and_reads_as_before(
    family: str, rope: dict[str, Any], older: dict[str, Any], tmp_path: Path
) -> None:
    config = with_rope(family, rope)
    config.save_pretrained(tmp_path / "new")
    (tmp_path / "both").mkdir()
    save_config(config, tmp_path / "both")
    found = json.loads((tmp_path / "both" / "config.json").read_text(encoding="utf-8"))
    assert found["torch_dtype"] == found["dtype"] == "bfloat16"
    for name, value in older.items():
        if isinstance(value, dict):
            assert found[name] == {key: part for key, part in value.items() if part is not None}
        else:
            assert found.get(name) == value
    before, after = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("new", "both"))
    (after.get("rope_parameters") or {}).pop("type", None)  # Phi-3's own files have it
    assert {**after, "_name_or_path": ""} == {**before, "_name_or_path": ""}


def test_saved_tokenizer_is_one_that_transformers_4_knows(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(12)
    tokenizer.add_special_tokens({"extra_special_tokens": ["w3", "w4"]})
    save_tokenizer(tokenizer, tmp_path)
    found = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert found["additional_special_tokens"] == ["w3", "w4"]
    assert not found.keys() & {"backend", "is_local", "local_files_only", "extra_special_tokens", "name_or_path"}
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.extra_special_tokens == ["w3", "w4"]


@pytest.mark.parametrize(
    "text", [None, "[]", '{"tokenizer_class": "LlamaTokenizer", "extra_special_tokens": {"image_token": "<i>"}}']
)
def test_other_tokenizer_files_stay_as_they_are(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    rename_tokenizer(tmp_path)
    assert (path.read_text(encoding="utf-8") if path.exists() else None) == text
