import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from inheritune_ds.errors import SurgeryError
from inheritune_ds.surgery.half_width import FAMILIES, halve_config, leading_half
from tests.surgery import tiny

CHANNELS, HEADS, KV_HEADS, HEAD_SIZE, UNITS = 32, 4, 2, 8, 48
VALUES: dict[str, Any] = {
    **tiny.IDS,
    "hidden_size": CHANNELS,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": UNITS,
    "max_position_embeddings": 24,
    "tie_word_embeddings": False,
}
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_inner": UNITS, "tie_word_embeddings": True, "num_key_value_heads": None, "intermediate_size": None},
    "opt": {"ffn_dim": UNITS, "word_embed_proj_dim": CHANNELS, "num_key_value_heads": None, "intermediate_size": None},
    "gpt_neox": {"num_key_value_heads": None},
    "qwen3": {"head_dim": HEAD_SIZE},
    "stablelm": {"use_qkv_bias": True},
}


def first_heads(heads: int, *, pieces: int = 1) -> list[int]:
    """Indices of the first half of the heads, if a head has `pieces` vectors one after the other."""
    size = pieces * HEAD_SIZE
    return [head * size + at for head in range(heads // 2) for at in range(size)]


# Indices along a dimension that the half holds.
CHANNEL = list(range(CHANNELS // 2))
UNIT = list(range(UNITS // 2))
QUERY, KEY = first_heads(HEADS), first_heads(KV_HEADS)
ALL_THREE = [piece * HEADS * HEAD_SIZE + at for piece in range(3) for at in QUERY]  # GPT-2: all q, all k, all v
EACH_THREE = first_heads(HEADS, pieces=3)  # GPT-NeoX: q, k and v of head 0, of head 1, ...
WHOLE = None
AXES: dict[str, list[tuple[str, tuple[list[int] | None, ...]]]] = {
    "gpt2": [
        (r"wte|wpe|lm_head", (WHOLE, CHANNEL)),
        (r"attn\.c_attn", (CHANNEL, ALL_THREE)),
        (r"attn\.c_proj", (QUERY, CHANNEL)),
        (r"mlp\.c_fc", (CHANNEL, UNIT)),
        (r"mlp\.c_proj", (UNIT, CHANNEL)),
    ],
    "gpt_neox": [
        (r"embed_in|embed_out|lm_head", (WHOLE, CHANNEL)),
        (r"query_key_value", (EACH_THREE, CHANNEL)),
        (r"attention\.dense", (CHANNEL, QUERY)),
        (r"dense_h_to_4h", (UNIT, CHANNEL)),
        (r"dense_4h_to_h", (CHANNEL, UNIT)),
    ],
    "others": [
        (r"embed_tokens|embed_positions|lm_head", (WHOLE, CHANNEL)),
        (r"q_proj", (QUERY, CHANNEL)),
        (r"[kv]_proj", (KEY, CHANNEL)),
        (r"o_proj|out_proj", (CHANNEL, QUERY)),
        (r"gate_proj|up_proj|fc1|c_fc", (UNIT, CHANNEL)),
        (r"down_proj|fc2|c_proj", (CHANNEL, UNIT)),
        (r"[qk]_norm", (WHOLE,)),
    ],
}


def half_of(family: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The expected half of a tensor."""
    rules = AXES.get(family, AXES["others"])
    axes = next((axes for pattern, axes in rules if re.search(pattern, name)), (CHANNEL,))
    if family == "opt" and re.search(r"[kv]_proj", name):
        axes = (QUERY, CHANNEL)  # as many heads for keys and values as for queries
    if name.endswith("bias"):
        axes = (axes[-1],) if family == "gpt2" else (axes[0],)
    assert len(axes) == tensor.dim(), name
    for dimension, places in enumerate(axes):
        if places is not WHOLE:
            tensor = tensor.index_select(dimension, torch.tensor(places))
    return tensor


@pytest.mark.parametrize("family", FAMILIES)
def test_half_holds_the_first_heads_units_and_channels(family: str, tmp_path: Path) -> None:
    values = {key: value for key, value in {**VALUES, **OWN.get(family, {})}.items() if value is not None}
    reference = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values))
    with torch.no_grad():
        for number, parameter in enumerate(reference.parameters()):
            # all numbers of a tensor are different
            places = torch.randperm(parameter.numel(), generator=torch.Generator().manual_seed(number))
            parameter.copy_((places + 1).view(parameter.shape) / parameter.numel())
    reference.save_pretrained(tmp_path / "reference")
    built = tiny.cut(tmp_path / "reference", tmp_path / "half", select="first:2", width="half")
    target = tiny.plain(built.folder)
    source = reference.state_dict()
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, half_of(family, name, source[name])), name
    config = target.config
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (CHANNELS // 2, HEADS // 2, 2)
    assert config.hidden_size // config.num_attention_heads == HEAD_SIZE
    assert getattr(config, "head_dim", None) in (None, HEAD_SIZE)
    assert getattr(config, "num_key_value_heads", None) in (None, KV_HEADS // 2, HEADS // 2)
    assert all(tensor["inherited"] for tensor in built.report["tensors"])
    assert built.report["width"] == "half"
    assert built.report["proof"]["hidden_state"] is None
    assert built.report["proof"]["hidden_state_reason"] == "not comparable: half the width"


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 2, 1), (5, 4)])
def test_leading_half_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(SurgeryError) as caught:
        leading_half(torch.zeros(4, 4), shape, "a.weight")
    assert caught.value.problem == f"width half: a.weight has shape [4, 4], the target's is {list(shape)}"


@pytest.mark.parametrize(
    ("family", "changes", "problem"),
    [
        ("bloom", {}, "the tensors of a bloom model cannot be halved head by head"),
        ("llama", {"num_key_value_heads": 1}, "num_key_value_heads is 1, an odd number"),
        ("gpt2", {"n_embd": 9, "n_head": 3}, "n_embd is 9, an odd number"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim is 16, hidden_size 32: the embeddings have another"),
        (
            "stablelm",
            {"qk_layernorm": True},
            "every head has a norm of its own (qk_layernorm is true), which the target",
        ),
    ],
)
def test_halve_config_refuses_settings_without_a_half(family: str, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(SurgeryError) as caught:
        halve_config(AutoConfig.for_model(family, **(changes if family == "gpt2" else {**VALUES, **changes})))
    assert caught.value.problem.startswith(f"width half: {problem}")
    expected = f"one of {', '.join(FAMILIES)}" if family == "bloom" else "a reference w"
    assert caught.value.allowed.startswith(expected)


def test_a_tensor_without_a_place_in_the_half_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**VALUES, "attention_bias": True}))
    reference.save_pretrained(tmp_path / "reference")

    def without_biases(config: Any) -> Any:
        half = halve_config(config)
        half.attention_bias = False
        return half

    monkeypatch.setattr("inheritune_ds.surgery.inherit.halve_config", without_biases)
    with pytest.raises(SurgeryError) as caught:
        tiny.cut(tmp_path / "reference", tmp_path / "half", select="first:2", width="half")
    assert caught.value.problem == (
        "the target, a llama model of 2 blocks, has no place for model.layers.0.self_attn.k_proj.bias of the reference"
    )
    assert caught.value.allowed == "another selection, or width: full"
