from typing import Any

import pytest
from transformers import AutoConfig

from inheritune_ds.surgery.configs import cut_config, set_dropout

LISTS: list[tuple[str, dict[str, Any], dict[str, list[Any]]]] = [
    (
        "qwen2",
        {"layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]},
        {"layer_types": ["sliding_attention", "sliding_attention"]},
    ),
    (
        "smollm3",
        {"no_rope_layers": [1, 0, 1, 0], "layer_types": ["full_attention"] * 4},
        {"no_rope_layers": [0, 0], "layer_types": ["full_attention"] * 2},
    ),
]


@pytest.mark.parametrize(("family", "given", "expected"), LISTS)
def test_cut_config_cuts_every_list_with_the_selection(
    family: str, given: dict[str, Any], expected: dict[str, list[Any]]
) -> None:
    config = AutoConfig.for_model(family, num_hidden_layers=4, **given)
    before = config.to_dict()
    cut = cut_config(config, (1, 3))
    assert cut.num_hidden_layers == 2
    assert {key: getattr(cut, key) for key in expected} == expected
    assert config.to_dict() == before
    # and nothing else is another
    changed = {key for key, value in cut.to_dict().items() if value != before[key]}
    assert changed == {"num_hidden_layers", *(key for key in expected if before[key] != expected[key])}


def test_cut_config_leaves_lists_of_another_length_or_meaning() -> None:
    config = AutoConfig.for_model("llama", num_hidden_layers=3, eos_token_id=[2, 7, 9], layer_notes=["a", "b"])
    cut = cut_config(config, (0, 1))
    assert cut.eos_token_id == [2, 7, 9]
    assert cut.layer_notes == ["a", "b"]


def test_cut_config_knows_the_depth_by_the_family_s_own_name() -> None:
    config = AutoConfig.for_model("gpt2", n_layer=12)
    cut = cut_config(config, tuple(range(5)))
    assert (cut.n_layer, cut.num_hidden_layers) == (5, 5)
    assert "num_hidden_layers" not in cut.to_dict()
    assert config.n_layer == 12


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("gpt2", {"attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout"}),
        ("llama", {"attention_dropout"}),
        ("opt", {"attention_dropout", "dropout"}),
        ("gpt_neox", {"attention_dropout", "classifier_dropout", "hidden_dropout"}),
        ("gpt_neo", {"attention_dropout", "classifier_dropout", "embed_dropout", "resid_dropout"}),
    ],
)
def test_set_dropout_writes_every_dropout_key_and_no_other(family: str, keys: set[str]) -> None:
    config = AutoConfig.for_model(family)
    before = config.to_dict()
    set_dropout(config, 0.375)
    after = config.to_dict()
    assert {key for key in after if after[key] != before[key]} == keys
    assert {after[key] for key in keys} == {0.375}
