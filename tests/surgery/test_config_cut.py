import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given as for_all
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from inheritune_ds.errors import SurgeryError
from inheritune_ds.surgery import config_cut
from inheritune_ds.surgery.config_cut import cut_config, set_dropout
from tests.surgery.families import random_model
from tests.surgery.tiny import cut

SELECTIONS = st.lists(st.integers(0, 11), min_size=1, max_size=8)

FULL, SLIDING = ["full_attention"], ["sliding_attention"]


@pytest.mark.parametrize(
    ("family", "given", "expected"),
    [
        ("qwen2", {"layer_types": (FULL + SLIDING) * 2}, {"layer_types": SLIDING * 2}),
        (
            "smollm3",
            {"no_rope_layers": [1, 0, 1, 0], "layer_types": FULL * 4},
            {"no_rope_layers": [0, 0], "layer_types": FULL * 2},
        ),
    ],
)
def test_cut_config_cuts_every_list_with_the_selection(
    family: str, given: dict[str, Any], expected: dict[str, list[Any]]
) -> None:
    config = AutoConfig.for_model(family, num_hidden_layers=4, **given)
    before = config.to_dict()
    cut = cut_config(config, (1, 3))
    assert cut.num_hidden_layers == 2
    assert {key: getattr(cut, key) for key in expected} == expected
    assert config.to_dict() == before
    changed = {key for key, value in cut.to_dict().items() if value != before[key]}
    assert changed == {"num_hidden_layers", *(key for key in expected if before[key] != expected[key])}


def test_cut_config_knows_the_depth_by_the_family_s_own_name() -> None:
    config = AutoConfig.for_model("gpt2", n_layer=12)
    cut = cut_config(config, tuple(range(5)))
    assert (cut.n_layer, cut.num_hidden_layers) == (5, 5)
    assert "num_hidden_layers" not in cut.to_dict()
    assert config.n_layer == 12


def test_cut_config_of_all_blocks_changes_nothing() -> None:
    config = AutoConfig.for_model("qwen2_moe", num_hidden_layers=4, decoder_sparse_step=2)
    assert cut_config(config, (0, 1, 2, 3)).to_dict() == config.to_dict()


def test_cut_config_leaves_the_names_of_classes() -> None:
    config = AutoConfig.for_model("llama", num_hidden_layers=4)
    cut = cut_config(config, (3, 1, 1))
    assert (cut.id2label, cut.label2id) == (config.id2label, config.label2id)


def test_a_block_that_depends_on_its_index_cannot_move() -> None:
    config = AutoConfig.for_model("gpt2", n_layer=4, scale_attn_by_inverse_layer_idx=True)
    assert cut_config(config, (0, 1)).scale_attn_by_inverse_layer_idx is True
    with pytest.raises(SurgeryError) as caught:
        cut_config(config, (0, 2))
    assert caught.value.problem == (
        "gpt2: with scale_attn_by_inverse_layer_idx = True a block's output depends on its index, and this "
        "selection changes block indices"
    )
    assert caught.value.allowed == "a selection that keeps every block at its index: first:n"
    assert cut_config(AutoConfig.for_model("gpt2", n_layer=4), (0, 2)).n_layer == 2


@pytest.mark.parametrize(
    ("family", "given", "blocks", "problem", "allowed"),
    [
        (
            "deepseek_v2",
            {"num_hidden_layers": 6, "first_k_dense_replace": 2},
            (3, 1),
            "first_k_dense_replace = 2: the selection puts a dense block after one with experts",
            "selections with all blocks below 2 before the others",
        ),
        (
            "jamba",
            {"num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 3},
            (3, 3, 0, 3),
            "attn_layer_period = 4, attn_layer_offset = 3: no period and offset describe the selected blocks",
            "a selection in which the blocks with number % 4 == 3 are evenly spaced",
        ),
    ],
)
def test_cut_config_refuses_inexpressible_selections(
    family: str, given: dict[str, Any], blocks: tuple[int, ...], problem: str, allowed: str
) -> None:
    with pytest.raises(SurgeryError) as caught:
        cut_config(AutoConfig.for_model(family, **given), blocks)
    assert caught.value.problem.startswith(problem)
    assert caught.value.allowed == allowed


def apply(rule: config_cut.Rule, values: dict[str, Any], blocks: Sequence[int]) -> dict[str, Any] | None:
    """Keys after a rule; None if it refuses."""
    try:
        return values | rule(values, 12, blocks)
    except SurgeryError:
        return None


@for_all(SELECTIONS, st.integers(1, 6), st.data())
def test_periods_mark_the_same_blocks_or_are_refused(blocks: list[int], period: int, data: st.DataObject) -> None:
    values = {"period": period, "offset": data.draw(st.integers(0, period - 1))}
    wanted = [block % period == values["offset"] for block in blocks]
    found = apply(config_cut._periods("period", "offset"), values, blocks)
    if found is not None:
        assert [place % found["period"] == found["offset"] for place in range(len(blocks))] == wanted
        assert 0 <= found["offset"] < found["period"]
    if blocks == list(range(blocks[0], blocks[0] + len(blocks))):
        assert found is not None  # neighbors keep their distances


@for_all(SELECTIONS, st.integers(0, 4), st.lists(st.integers(0, 11), unique=True))
def test_sparse_steps_mark_the_same_blocks(blocks: list[int], step: int, dense: list[int]) -> None:
    values = {"decoder_sparse_step": step, "mlp_only_layers": sorted(dense)}
    found = apply(config_cut._sparse_step, values, blocks)
    assert found is not None

    def has_experts(keys: dict[str, Any], block: int) -> bool:
        every = keys["decoder_sparse_step"]
        return bool(block not in keys["mlp_only_layers"] and every > 0 and (block + 1) % every == 0)

    for place, block in enumerate(blocks):
        assert has_experts(found, place) == has_experts(values, block)


@for_all(SELECTIONS, st.integers(0, 12))
def test_dense_blocks_come_first_or_are_refused(blocks: list[int], first: int) -> None:
    found = apply(config_cut._dense_first, {"first_k_dense_replace": first}, blocks)
    if found is None:
        assert any(one >= first > other for one, other in pairwise(blocks))
    else:
        assert [place < found["first_k_dense_replace"] for place in range(len(blocks))] == [
            block < first for block in blocks
        ]


@for_all(SELECTIONS, st.integers(0, 11), st.integers(-1, 11), st.integers(1, 4))
def test_spans_of_experts_mark_the_same_blocks_or_are_refused(
    blocks: list[int], start: int, end: int, interval: int
) -> None:
    values = {"moe_layer_start_index": start, "moe_layer_end_index": end, "moe_layer_interval": interval}

    def has_experts(keys: dict[str, Any], block: int, depth: int) -> bool:
        last = keys["moe_layer_end_index"] if keys["moe_layer_end_index"] >= 0 else depth - 1
        return bool(keys["moe_layer_start_index"] <= block <= last and (block + 1) % keys["moe_layer_interval"] == 0)

    found = apply(config_cut._moe_span, values, blocks)
    if found is not None:
        for place, block in enumerate(blocks):
            assert has_experts(found, place, len(blocks)) == has_experts(values, block, 12)


@for_all(SELECTIONS, st.lists(st.sampled_from(["recurrent", "attention"]), min_size=1, max_size=5))
def test_cycles_are_unrolled(blocks: list[int], pattern: list[str]) -> None:
    found = apply(config_cut._cycle, {"block_types": pattern}, blocks)
    assert found is not None
    assert found["block_types"] == [(pattern * 12)[block] for block in blocks]


@for_all(st.integers(1, 12), st.floats(0.1, 20))
def test_residual_scale_of_a_block_is_unchanged(count: int, scale: float) -> None:
    found = apply(config_cut._residual_scale, {"scale_depth": scale}, range(count))
    assert found is not None
    assert found["scale_depth"] / math.sqrt(count) == pytest.approx(scale / math.sqrt(12), rel=1e-15)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("layer_types", ["a", "b", "c", "d"], ["d", "b"]),
        ("layer_types", ["a", "b", "c"], ["a", "b", "c"]),
        ("eos_token_id", [5, 6, 7, 8], [5, 6, 7, 8]),
        ("mlp_only_layers", [1, 2], [1]),
        ("mlp_only_layers", [], []),
        ("mlp_only_layers", [7], [7]),
        ("no_rope_layers", [0, 1, 1, 0], [0, 1]),
        ("attn_layer_indices", [3], [0]),
        ("vocabulary", [1, 2], [1, 2]),
        ("num_key_value_heads", [1, 2, 3, 4], [4, 2]),
    ],
)
def test_lists_are_cut_if_they_describe_blocks(key: str, value: list[Any], expected: list[Any]) -> None:
    assert config_cut._cut_list(key, value, 4, (3, 1)) == expected


@pytest.mark.parametrize(("table", "expected"), [({0: "a", 3: "b"}, {0: "b"}), ({"1": "c", "2": "d"}, {"1": "c"})])
def test_tables_by_block_number_are_cut(table: dict[Any, str], expected: dict[Any, str]) -> None:
    assert config_cut._renumber(table, (3, 1)) == expected


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


@pytest.mark.parametrize(
    ("family", "select", "cached"),
    [
        ("lfm2", "0,2,3", False),
        ("qwen3_next", "0", False),
        ("jamba", "0,2,3", False),
        ("lfm2", "0,1", True),  # with an attention block
        ("mamba", "first:2", True),  # without attention from the start
        ("llama", "first:2", True),
    ],
)
def test_cut_without_attention_generates_without_a_cache(
    family: str,
    select: str,
    cached: bool,  # noqa: FBT001
    tmp_path: Path,
) -> None:
    random_model(family).save_pretrained(tmp_path / "reference")
    folder = cut(tmp_path / "reference", tmp_path / "target", select=select, words=None).folder
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.config.use_cache, model.generation_config.use_cache is not False) == (cached, cached)
    found = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert found.shape == (1, 6)
