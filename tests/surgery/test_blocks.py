from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from inheritune_ds.errors import SurgeryError
from inheritune_ds.surgery.blocks import BlockList, cut_config, find_blocks, set_dropout

PATHS = {
    "gpt2": "transformer.h",
    "llama": "model.layers",
    "qwen2": "model.layers",
    "smollm3": "model.layers",
    "opt": "model.decoder.layers",
    "gpt_neox": "gpt_neox.layers",
}


@pytest.mark.parametrize("family", PATHS)
def test_find_blocks_finds_the_list_of_every_family(family: str, make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model(family)
    blocks = find_blocks(model, 4)
    assert blocks == BlockList(PATHS[family], 4)
    indices = [blocks.index_of(name) for name in model.state_dict()]
    assert {index for index in indices if index is not None} == {0, 1, 2, 3}
    assert all(
        (index is None) == (not name.startswith(PATHS[family] + "."))
        for name, index in zip(model.state_dict(), indices, strict=True)
    )


def test_find_blocks_works_without_weights(make_model: Callable[..., PreTrainedModel]) -> None:
    model: nn.Module = make_model("llama")
    assert find_blocks(model.to(torch.device("meta")), 4).path == "model.layers"


def test_find_blocks_prefers_the_outer_list() -> None:
    inner = nn.Module()
    inner.experts = nn.ModuleList(nn.Linear(1, 1) for _ in range(2))
    outer = nn.Module()
    outer.layers = nn.ModuleList([inner, nn.Linear(1, 1)])
    assert find_blocks(outer, 2) == BlockList("layers", 2)


@pytest.mark.parametrize(
    ("lists", "depth", "found"),
    [({"left": 2, "right": 2}, 2, "left, right"), ({"left": 3}, 2, "none"), ({}, 1, "none")],
)
def test_find_blocks_refuses_to_guess(lists: dict[str, int], depth: int, found: str) -> None:
    model = nn.Module()
    for name, length in lists.items():
        setattr(model, name, nn.ModuleList(nn.Linear(1, 1) for _ in range(length)))
    with pytest.raises(SurgeryError) as caught:
        find_blocks(model, depth)
    assert caught.value.problem == f"the blocks of a Module cannot be told: module lists with {depth} entries: {found}"
    assert caught.value.allowed == "a decoder-only model with one list of blocks"


def test_block_list_renames_and_numbers_by_whole_path() -> None:
    blocks = BlockList("model.layers", 12)
    assert blocks.index_of("model.layers.11.mlp.up.weight") == 11
    assert blocks.index_of("model.layers_norm.1.weight") is None
    assert blocks.index_of("model.embed.weight") is None
    assert blocks.renamed("model.layers.1.mlp.1.weight", 10) == "model.layers.10.mlp.1.weight"


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
