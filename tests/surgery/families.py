"""Tiny configs of every family of causal language models that transformers builds, for the surgery tests.

A config is the family's own one with every size shrunk (`SIZES`) and the family's exceptions on top
(`EXCEPTIONS`). What differs from block to block is switched on and mixed irregularly, so that a cut which gives a
block another block's behaviour changes the logits.
"""

from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

BLOCKS = 6
PerBlock = Callable[[int], Any]


def per_block(*pattern: Any) -> PerBlock:
    """Repeat a pattern to the depth: a list with one value per block."""
    return lambda depth: list(islice(cycle(pattern), depth))


def mixed(one: Any, other: Any) -> PerBlock:
    """Mix two values irregularly: neither a period nor a count of first blocks describes the list."""
    return per_block(one, other, one, one, other, other)


def some(*indices: int) -> PerBlock:
    """Name some blocks by index."""
    return lambda depth: [index for index in indices if index < depth]


SLIDING = mixed("sliding_attention", "full_attention")
LINEAR = mixed("linear_attention", "full_attention")
SPARSE = per_block("dense", "sparse", "sparse", "dense", "sparse", "dense")
INDEXED = per_block("indexed_attention")

# Sizes by the names that the library's configs have for them; a config gets those that its class knows.
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "embedding_size": 32,
    # windows shorter than a probe of 12 tokens
    "sliding_window": 4,
    "sliding_window_size": 4,
    # mixtures of experts
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    # latent and indexed attention; the index keeps fewer tokens than a probe has
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 4,
    "index_head_dim": 16,
    "index_n_heads": 2,
    # state spaces, linear attention and short convolutions
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_conv": 3,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "mamba_chunk_size": 4,
    "mamba_dt_rank": 4,
    "time_step_rank": 4,
    "conv_kernel": 3,
    "conv_kernel_size": 3,
    "conv_L_cache": 3,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "use_mamba_kernels": False,
    # the names of GPT-2 and of BART
    "n_embd": 32,
    "n_head": 4,
    "n_positions": 64,
    "rotary_dim": 4,
    "d_model": 32,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "encoder_layers": 1,  # not the decoder's depth: `num_hidden_layers` of these configs is the encoder's
    "ffn_dim": 48,
}
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")

DECODER = {"is_decoder": True}  # BERT's relatives look ahead without it
LATENT = {"num_key_value_heads": 4}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "afmoe": {"layer_types": SLIDING, "num_dense_layers": 2},
    "axk1": {**LATENT, "mlp_layer_types": SPARSE},
    "axk2": {**LATENT, "mlp_layer_types": SPARSE, "gated_norm_rank": 4},
    "aria_text": {"intermediate_size": 24},
    "bailing_hybrid": {**LATENT, "layer_types": LINEAR, "mlp_layer_types": SPARSE, "model_max_length": 64},
    "bamba": {"attn_layer_indices": some(1, 4)},
    "beam": {"layer_types": SLIDING, "mlp_layer_types": SPARSE},
    "bert": DECODER,
    "bert-generation": DECODER,
    "big_bird": {**DECODER, "attention_type": "original_full"},
    "camembert": DECODER,
    "cohere2": {"layer_types": SLIDING},
    "cohere2_moe": {"layer_types": SLIDING, "mlp_layer_types": SPARSE},
    "cohere_compass_text": {
        "layer_types": SLIDING,
        "rope_parameters": {"sliding_attention": {**ROPE, "mrope_section": [2, 1, 1]}, "full_attention": None},
    },
    "cpmant": {
        "dim_head": 8,
        "dim_ff": 48,
        "prompt_types": 3,
        "prompt_length": 4,
        "segment_types": 4,
        "position_bias_num_buckets": 16,
        "position_bias_max_distance": 32,
    },
    "ctrl": {"dff": 48},
    "cwm": {"layer_types": SLIDING},
    "data2vec-text": DECODER,
    "dbrx": {
        "n_heads": 4,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {**LATENT, "first_k_dense_replace": 2},
    "deepseek_v3": {**LATENT, "first_k_dense_replace": 2},
    "deepseek_v32": {**LATENT, "mlp_layer_types": SPARSE},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "layer_types": per_block(
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "heavily_compressed_attention",
            "sliding_attention",
            "compressed_sparse_attention",
        ),
        "mlp_layer_types": mixed("hash_moe", "moe"),
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "partial_rotary_factor": 0.5,
        "hc_mult": 2,
        "o_groups": 2,
        "o_lora_rank": 8,
    },
    "dots1": {"layer_types": SLIDING, "first_k_dense_replace": 2},
    "dots3_note_text": {
        **LATENT,
        "layer_types": mixed("sliding_attention", "indexed_attention"),
        "mlp_layer_types": SPARSE,
        "shared_experts_intermediate_size": 24,
        "head_dim": 16,
        # the blocks with a window have sizes of their own (`per_layer_config`)
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "electra": DECODER,
    "ernie": DECODER,
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_end_index": 4, "moe_layer_interval": 2},
    "exaone4": {"layer_types": SLIDING},
    "exaone_moe": {"layer_types": SLIDING, "mlp_layer_types": SPARSE},
    "falcon_h1": {"mamba_d_ssm": 64},
    "flint": {"layer_types": SLIDING, "mlp_only_layers": some(1, 4)},
    "gemma2": {"layer_types": SLIDING},
    "gemma3_text": {"layer_types": SLIDING},
    "gemma3n_text": {
        "layer_types": SLIDING,
        "intermediate_size": mixed(48, 24),
        "activation_sparsity_pattern": mixed(0.5, 0.0),
        "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "num_kv_shared_layers": 2,
    },
    "gemma4_text": {
        "layer_types": SLIDING,
        "global_head_dim": 16,
        "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 8,
    },
    "gemma4_unified_text": {"layer_types": SLIDING, "global_head_dim": 16},
    "git": {"vision_config": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "image_size": 32}},
    "glm4_moe": {"first_k_dense_replace": 2},
    "glm4_moe_lite": {**LATENT, "mlp_layer_types": SPARSE},
    "glm_moe_dsa": {
        **LATENT,
        "mlp_layer_types": SPARSE,
        "indexer_types": per_block("full", "shared", "full", "full", "shared", "shared"),
    },
    "gpt_neo": {
        "num_heads": 4,
        "window_size": 4,
        "attention_types": lambda depth: [[[kind], 1] for kind in mixed("global", "local")(depth)],
    },
    "gpt_oss": {"layer_types": SLIDING},
    "granite_swa": {"layer_types": SLIDING, "layer_rope_theta": per_block(10000.0, 100.0, 0)},
    "granitemoe_swa": {"layer_types": SLIDING, "layer_rope_theta": per_block(10000.0, 100.0, 0)},
    "granitemoehybrid": {"layer_types": LINEAR},
    "hrm_text": {"num_layers_per_stack": lambda depth: depth, "num_hidden_layers": lambda depth: depth * 8},
    "hy_v3": {"mlp_layer_types": SPARSE},
    "hy_v4": {
        "mlp_layer_types": SPARSE,
        "indexer_types": per_block("full", "shared", "full", "full", "shared", "shared"),
        "hc_mult": 2,
    },
    "inkling_text": {
        "layer_types": mixed("hybrid_sliding", "hybrid"),
        "mlp_layer_types": SPARSE,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 1,
        "swa_head_dim": 16,
        "rel_extent": 16,
        "d_rel": 4,
    },
    "inkling2_text": {
        "layer_types": mixed("hybrid_sliding", "hybrid"),
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 1,
        "swa_head_dim": 16,
        "rel_extent": 16,
        "d_rel": 4,
        "unpadded_vocab_size": 97,
        "n_layers_per_attn_res_block": 2,
    },
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "jetmoe": {"kv_channels": 8},
    "kimi_linear": {**LATENT, "layer_types": LINEAR, "mlp_layer_types": SPARSE, "model_max_length": 64},
    "kolibri1": {"layer_types": SLIDING},
    "laguna": {"layer_types": SLIDING, "mlp_layer_types": SPARSE, "num_attention_heads_per_layer": mixed(4, 2)},
    "lfm2": {"layer_types": mixed("conv", "full_attention"), "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": mixed("conv", "full_attention"), "num_dense_layers": 2},
    "lfm3": {"layer_types": per_block("conv", "full_attention", "sliding_attention", "sliding_attention", "conv")},
    "llama4_text": {
        "layer_types": mixed("chunked_attention", "full_attention"),
        "no_rope_layers": mixed(1, 0),
        "moe_layers": some(1, 4),
        "attention_chunk_size": 4,
        "intermediate_size_mlp": 48,
        "intermediate_size": 24,
        "floor_scale": 4,
    },
    "longcat_flash": {**LATENT, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 24, "zero_expert_num": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4},
    "marian": {"decoder_vocab_size": 97},
    "megatron-bert": DECODER,
    "mellum": {"layer_types": SLIDING, "mlp_layer_types": SPARSE},
    "mimo_v2_flash": {"layer_types": SLIDING, "mlp_layer_types": SPARSE},
    "minicpm3": LATENT,
    "minimax": {"layer_types": LINEAR, "block_size": 4, "linear_attn_alpha_factor": 1.5, "mlp_beta_factor": 0.5},
    "minimax_m3_vl_text": {
        "layer_types": mixed("full_attention", "minimax_m3_sparse"),
        "mlp_layer_types": SPARSE,
        "dense_intermediate_size": 48,
        "index_block_size": 2,
        "index_topk_blocks": 2,
    },
    "ministral": {"layer_types": SLIDING},
    "modernbert-decoder": {"layer_types": SLIDING, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
    "mpt": {"n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2},
    "nemotron_h": {
        "layers_block_type": per_block("linear_attention", "moe", "full_attention", "mlp", "linear_attention", "moe"),
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "chunk_size": 4,
        "moe_shared_expert_intermediate_size": 24,
    },
    "olmo3": {"layer_types": SLIDING},
    "olmo_hybrid": {"layer_types": LINEAR, "linear_num_key_heads": 4},
    "prophetnet": {
        "num_encoder_layers": 1,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
        "num_buckets": 8,
        "relative_max_distance": 16,
    },
    "qwen2": {"use_sliding_window": True, "layer_types": SLIDING},
    "qwen2_moe": {"use_sliding_window": True, "layer_types": SLIDING, "mlp_only_layers": some(1, 4)},
    "qwen3": {"use_sliding_window": True, "layer_types": SLIDING},
    "qwen3_5_text": {"layer_types": LINEAR},
    "qwen3_5_moe_text": {"layer_types": LINEAR},
    "qwen3_moe": {"mlp_only_layers": some(1, 4)},
    "qwen3_next": {"layer_types": LINEAR, "mlp_only_layers": some(1, 4)},
    "qwen4_exp_text": {
        "layer_types": per_block("linear_attention", "indexed_attention", "linear_attention"),
        "hc_count": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": lambda depth: [index + 1 for index in some(0, 3)(depth)],
        "ple_embed_dim": 16,
        "ngram_size": 2,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 4,
        "split_ngram_parts": 1,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {
        "block_types": mixed("recurrent", "attention"),
        "lru_width": 32,
        "attention_window_size": 4,
        "conv1d_width": 3,
    },
    "reformer": {
        **DECODER,
        "attn_layers": mixed("local", "lsh"),
        "attention_head_size": 8,
        "feed_forward_size": 48,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "hash_seed": 1,  # the hashes are drawn anew in every pass without it
    },
    "rembert": {**DECODER, "input_embedding_size": 16, "output_embedding_size": 24},
    "roberta": DECODER,
    "roberta-prelayernorm": DECODER,
    "roc_bert": {
        **DECODER,
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 97,
        "shape_embed_dim": 8,
        "shape_vocab_size": 97,
    },
    "roformer": DECODER,
    "rwkv": {"attention_hidden_size": 32, "context_length": 64, "rescale_every": 0},
    "smollm3": {"use_sliding_window": True, "layer_types": SLIDING, "no_rope_layers": per_block(1, 1, 0)},
    "vaultgemma": {"layer_types": SLIDING},
    "xglm": {"attention_heads": 4},
    "xlm": {"emb_dim": 32, "n_heads": 4, "causal": True},
    "xlm-roberta": DECODER,
    "xlm-roberta-xl": DECODER,
    "xlnet": {"d_inner": 48, "d_head": 8, "attn_type": "uni"},
    "xlstm": {"num_heads": 4, "embedding_dim": 32, "num_blocks": lambda depth: depth, "chunk_size": 4},
    "xmod": {**DECODER, "default_language": "en_XX"},
    "youtu": LATENT,
    "zamba": {
        "layers_block_type": per_block("linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"),
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "layers_block_type": per_block("linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"),
        "n_mamba_heads": 4,
        "chunk_size": 4,
        "adapter_rank": 4,
    },
    "zaya": {
        "layer_types": mixed("hybrid", "hybrid_sliding"),
        "num_experts_per_tok": 1,
        "router_hidden_size": 16,
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2+inverse_layer_idx": {"scale_attn_by_inverse_layer_idx": True},
    "qwen3_moe+decoder_sparse_step": {"decoder_sparse_step": 2, "mlp_only_layers": []},
}
NOT_TINY: dict[str, str] = {}


def tiny_config(model_type: str, num_blocks: int = BLOCKS) -> PreTrainedConfig:
    """Make a tiny config.

    Args:
        model_type: A type of the library, or the name of one of `VARIANTS`.
        num_blocks: Its depth.
    """
    family = model_type.partition("+")[0]
    known = AutoConfig.for_model(family)
    defaults = known.to_dict()
    values: dict[str, Any] = {key: value for key, value in SIZES.items() if key in defaults}
    values |= {key: num_blocks for key in DEPTH_KEYS if key in defaults}
    values |= {key: 0.0 for key, value in defaults.items() if "drop" in key and isinstance(value, float)}
    values |= EXCEPTIONS.get(family, {}) | VARIANTS.get(model_type, {})
    return type(known)(**{key: value(num_blocks) if callable(value) else value for key, value in values.items()})


TYPES = tuple(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in NOT_TINY)
