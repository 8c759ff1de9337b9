"""Derive the target's config from the reference's and the selected blocks.

A config describes single blocks in three ways: lists with one entry per block (`layer_types`), lists of block numbers
(`mlp_only_layers`), and numbers that map a block's index to its kind (`decoder_sparse_step`). Lists are cut. Numbers
are rewritten by the rules of this module where the config can express the result. `meta_model.check_same_blocks`
compares the modules of the two models, so a family without a rule is refused, never cut wrongly.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from inheritune_ds.errors import SurgeryError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DROPOUT_KEY = re.compile(r"(^|_)(dropout|pdrop|dropout_p|dropout_prob|dropout_rate)($|_)")
_PER_BLOCK_KEY = re.compile(r"layer|block|pattern|intermediate_size|num_.*heads|topk|experts|^moe_|_types$")
_BLOCK_NUMBERS_KEY = re.compile(r"(layers|layer_ids|layer_idx|indices|idxs|idx|layers_enum)$")
_FLAG_KEY = "no_rope_layers"
"""A list of 0 and 1, one per block, named like a list of block numbers."""
_DEPTH_KEYS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_blocks")
_INDEX_KEY = "scale_attn_by_inverse_layer_idx"
"""A switch that makes a block's computation depend on its index (GPT-2)."""
Values = dict[str, Any]
Rule = Callable[[Values, int, Sequence[int]], Values]
"""Maps config, depth and kept blocks to the changed keys."""


def num_blocks(config: "PreTrainedConfig") -> int:
    """Number of blocks in a config; raise a SurgeryError if it has none."""
    depth = getattr(config, "num_hidden_layers", None)
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
        raise SurgeryError(
            f"a {config.model_type} config has no number of blocks (num_hidden_layers is {depth!r})",
            allowed="a decoder-only causal language model with one list of blocks",
        )
    return depth


def cut_config(config: "PreTrainedConfig", blocks: Sequence[int]) -> "PreTrainedConfig":
    """Copy the reference's config for the kept blocks, in the target's order.

    Raises a SurgeryError if a block's computation depends on its index in a way that the config cannot express.
    """
    depth = num_blocks(config)
    values = config.to_dict()
    if tuple(blocks) == tuple(range(depth)):
        return type(config).from_dict(values)
    if values.get(_INDEX_KEY) and tuple(blocks) != tuple(range(len(blocks))):
        raise SurgeryError(
            f"{config.model_type}: with {_INDEX_KEY} = {values[_INDEX_KEY]} a block's output depends on its index, and "
            "this selection changes block indices",
            allowed="a selection that keeps every block at its index: first:n",
        )
    values |= _cut_values(values, depth, blocks)
    depth_key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    values |= {key: len(blocks) for key in (*_DEPTH_KEYS, depth_key) if values.get(key) == depth}
    try:
        return type(config).from_dict(values)
    except Exception as error:  # noqa: BLE001 - config classes raise errors of many kinds
        raise SurgeryError(
            f"a {config.model_type} config for {len(blocks)} blocks is refused by its own class: {error}",
            allowed="another selection",
        ) from None


def _cut_values(values: Values, depth: int, blocks: Sequence[int]) -> Values:
    """Cut the lists, tables and numbers that describe single blocks."""
    cut: Values = {}
    for key, value in values.items():
        if isinstance(value, list | tuple):
            cut[key] = _cut_list(key, list(value), depth, blocks)
        elif isinstance(value, dict) and value and key != "id2label" and all(str(at).isdecimal() for at in value):
            cut[key] = _renumber(value, blocks)
    for rule in _RULES:
        cut |= rule(values, depth, blocks)
    return cut


def _cut_list(key: str, value: list[Any], depth: int, blocks: Sequence[int]) -> list[Any]:
    """Cut a list; lists that do not describe blocks stay unchanged."""
    numbers = all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < depth for item in value)
    if numbers and _BLOCK_NUMBERS_KEY.search(key) and key != _FLAG_KEY and sorted(set(value)) == value:
        return [place for place, block in enumerate(blocks) if block in value]
    if len(value) == depth and _PER_BLOCK_KEY.search(key):
        return [value[block] for block in blocks]
    return value


def _renumber(value: dict[Any, Any], blocks: Sequence[int]) -> dict[Any, Any]:
    """Cut a table by block number."""
    by_block = {int(block): (type(block), entry) for block, entry in value.items()}
    return {by_block[block][0](place): by_block[block][1] for place, block in enumerate(blocks) if block in by_block}


def _sparse_step(values: Values, _depth: int, blocks: Sequence[int]) -> Values:
    """Qwen-MoE: block i is a mixture of experts if (i + 1) % decoder_sparse_step == 0 and not in mlp_only_layers."""
    if "decoder_sparse_step" not in values:
        return {}
    step, dense = values["decoder_sparse_step"], values.get("mlp_only_layers") or []
    places = [place for place, block in enumerate(blocks) if block in dense or not step or (block + 1) % step != 0]
    return {"decoder_sparse_step": 1, "mlp_only_layers": places}


def _dense_first(values: Values, _depth: int, blocks: Sequence[int]) -> Values:
    """DeepSeek, GLM, AFMoE, LFM: the first blocks are dense, the others mixtures of experts."""
    key = next((key for key in ("first_k_dense_replace", "num_dense_layers") if isinstance(values.get(key), int)), None)
    if key is None or isinstance(values.get("mlp_layer_types"), list):
        return {}
    first = values[key]
    dense = [block < first for block in blocks]
    if dense != sorted(dense, reverse=True):
        raise SurgeryError(
            f"{key} = {first}: the selection puts a dense block after one with experts, which this key cannot express",
            allowed=f"selections with all blocks below {first} before the others",
        )
    return {key: sum(dense)}


def _periods(period_key: str, offset_key: str) -> Rule:
    """Jamba: block i has attention (or experts) if (i - offset) % period == 0, with 0 <= offset < period."""

    def rule(values: Values, _depth: int, blocks: Sequence[int]) -> Values:
        period, offset = values.get(period_key), values.get(offset_key)
        if not isinstance(period, int) or not isinstance(offset, int):
            return {}
        wanted = [block % period == offset for block in blocks]
        # A period beyond the last block marks one block at most, or none.
        for new_period, new_offset in ((p, o) for p in range(1, len(blocks) + 2) for o in range(p)):
            if [place % new_period == new_offset for place in range(len(blocks))] == wanted:
                return {period_key: new_period, offset_key: new_offset}
        raise SurgeryError(
            f"{period_key} = {period}, {offset_key} = {offset}: no period and offset describe the selected blocks",
            allowed=f"a selection in which the blocks with number % {period} == {offset} are evenly spaced",
        )

    return rule


def _moe_span(values: Values, depth: int, blocks: Sequence[int]) -> Values:
    """ERNIE: blocks moe_layer_start_index to moe_layer_end_index (-1: last) have experts, every interval-th block."""
    start, end, interval = (values.get(f"moe_layer_{name}") for name in ("start_index", "end_index", "interval"))
    if not isinstance(start, int) or not isinstance(end, int) or not isinstance(interval, int):
        return {}
    last = depth - 1 if end == -1 else end
    wanted = [start <= block <= last and (block + 1) % interval == 0 for block in blocks]
    places = [place for place, has in enumerate(wanted) if has]
    first, final = (places[0], places[-1]) if places else (len(blocks), len(blocks))
    for step in range(1, len(blocks) + 1):
        if [first <= place <= final and (place + 1) % step == 0 for place in range(len(blocks))] == wanted:
            return {"moe_layer_start_index": first, "moe_layer_end_index": final, "moe_layer_interval": step}
    raise SurgeryError(
        f"moe_layer_interval = {interval}: no interval describes which of the selected blocks have experts",
        allowed="a selection in which the blocks with experts are evenly spaced",
    )


def _cycle(values: Values, _depth: int, blocks: Sequence[int]) -> Values:
    """RecurrentGemma: block_types is a pattern that repeats over the blocks."""
    pattern = values.get("block_types")
    if not isinstance(pattern, list | tuple) or not pattern:
        return {}
    return {"block_types": [pattern[block % len(pattern)] for block in blocks]}


def _residual_scale(values: Values, depth: int, blocks: Sequence[int]) -> Values:
    """MiniCPM: every block's output is scaled by scale_depth / sqrt(number of blocks)."""
    scale = values.get("scale_depth")
    if not isinstance(scale, float):
        return {}
    wanted, root = scale / math.sqrt(depth), math.sqrt(len(blocks))
    rounded = wanted * root
    near = [rounded, math.nextafter(rounded, 0.0), math.nextafter(rounded, math.inf)]
    return {"scale_depth": next((value for value in near if value / root == wanted), rounded)}


def _attention_types(values: Values, depth: int, blocks: Sequence[int]) -> Values:
    """GPT-Neo: attention_types is [[kinds, repeats], ...]; attention_layers is its expansion, one kind per block."""
    layers = values.get("attention_layers")
    if isinstance(layers, list | tuple) and len(layers) == depth and "attention_types" in values:
        return {"attention_types": [[[layers[block]], 1] for block in blocks]}
    return {}


_RULES: tuple[Rule, ...] = (
    _sparse_step,
    _dense_first,
    _periods("attn_layer_period", "attn_layer_offset"),
    _periods("expert_layer_period", "expert_layer_offset"),
    _moe_span,
    _cycle,
    _residual_scale,
    _attention_types,
)


def keeps_cache(reference: "PreTrainedConfig", target: "PreTrainedConfig") -> bool:
    """Whether a target can generate with a cache.

    A hybrid model counts the tokens in the cache of its attention blocks. Without any of them transformers' `generate`
    raises, unless it is told to use no cache. Models without attention, such as Mamba, do not count.
    """
    return _counts_tokens(target) or not _counts_tokens(reference)


def _counts_tokens(config: "PreTrainedConfig") -> bool:
    """Whether the cache of a model knows the number of its tokens."""
    from transformers import DynamicCache

    try:
        DynamicCache(config=config).get_seq_length()
    except ValueError:
        return False
    return True


def set_dropout(config: "PreTrainedConfig", dropout: float) -> None:
    """Write one dropout probability to every dropout key of a config (`attn_pdrop`, `attention_dropout`, ...)."""
    for key, value in config.to_dict().items():
        if isinstance(value, int | float) and not isinstance(value, bool) and DROPOUT_KEY.search(key):
            setattr(config, key, dropout)
