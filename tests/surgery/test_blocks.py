from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from inheritune_ds.errors import SurgeryError
from inheritune_ds.surgery.blocks import BlockList, find_blocks
from tests.surgery.tiny import PATHS


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


def test_block_list_numbers_by_whole_path() -> None:
    blocks = BlockList("model.layers", 12)
    assert blocks.index_of("model.layers.11.mlp.up.weight") == 11
    assert blocks.index_of("model.layers_norm.1.weight") is None
    assert blocks.index_of("model.layers_2.weight") is None
    assert blocks.index_of("model.embed.weight") is None
    assert blocks.rest("model.layers.11.mlp.1.weight") == "mlp.1.weight"
