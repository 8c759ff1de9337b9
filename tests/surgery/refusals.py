"""Which families (and variants of `families.VARIANTS`) cannot be cut, and which only so that blocks keep their places.

The words are part of the message that a user gets; docs/reference/surgery.md shows them.
"""

_ENCODER = "it is of an encoder-decoder family"
_PER_BLOCK = "tensors outside the blocks have a part for each block"
_INDEXER = "blocks reuse the key selection of an earlier block"
_SHARED_KEYS = "blocks share keys and values across layers"

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus"),
            *("plbart", "prophetnet", "whisper"),
        ),
        _ENCODER,
    ),
    "gemma3n_text": _SHARED_KEYS,
    "gemma3n_text+no_kv_shared": _PER_BLOCK,
    "gemma4_text+kv_shared": _SHARED_KEYS,
    "gemma4_unified_text+kv_shared": _SHARED_KEYS,
    "glm_moe_dsa": _INDEXER,
    "hrm_text": "cannot be identified",
    "hy_v4": _INDEXER,
    "longcat_flash": "cannot be identified",
    "reformer": "cannot be proven",
    "xlm": "cannot be identified",
    "zamba": "its blocks share weights",
    "zamba2": "its blocks share weights",
    "zamba2+two_shared": "its blocks share weights",
}
"""Every selection is refused."""

_GEMMA4 = "is not homogeneous across layers"
_ZAYA = "on more than the hidden state"
_FIRST_ONLY = ("last:2", "0,2,5", "even:3")
IN_PLACE: dict[str, dict[str, str]] = {
    "beam": dict.fromkeys(_FIRST_ONLY, "attn_residual_add_idx"),
    "diffllama": dict.fromkeys(_FIRST_ONLY, "self_attn.lambda_init"),
    "gemma4_text": {"first:3": _GEMMA4, **dict.fromkeys(_FIRST_ONLY, _PER_BLOCK)},
    "gemma4_text+k_eq_v": {"first:3": _GEMMA4, **dict.fromkeys(_FIRST_ONLY, _PER_BLOCK)},
    "gemma4_text+moe": {"first:3": _GEMMA4, **dict.fromkeys(_FIRST_ONLY, _PER_BLOCK)},
    "gemma4_text+no_per_layer_input": {"first:3": _GEMMA4},
    "gemma4_unified_text": {"first:3": _GEMMA4},
    "gpt2+inverse_layer_idx": dict.fromkeys(_FIRST_ONLY, "scale_attn_by_inverse_layer_idx"),
    "gpt_neox_japanese": {"first:3": "attention.dense_bias"},
    "inkling2_text": {
        "first:3": "has no block number",
        **dict.fromkeys(("0,2,5", "even:3"), "is_block_boundary"),
        "last:2": "attention_input",
    },
    "jamba": {"even:3": "expert_layer_period"},
    "modernbert-decoder": {"last:2": "attn_norm is a LayerNorm there and a Identity here"},
    "olmo_hybrid": {"last:2": "is refused by its own class"},
    "qwen4_exp_text": {
        **dict.fromkeys(("first:3", "0,2,5", "even:3"), "cannot be loaded part by part"),
        "last:2": "is refused by its own class",
    },
    "rwkv": {"last:2": "pre_ln is a nothing there and a LayerNorm here"},
    "zaya": {**dict.fromkeys(("first:3", "0,2,5", "even:3"), _ZAYA), "last:2": "mlp.gate.router_states_scale"},
}
"""These selections of tests/surgery/test_families.py are refused; the others are exact."""
