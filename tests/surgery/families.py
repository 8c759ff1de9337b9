"""Tiny configs of every family of causal language models that transformers builds, for the surgery tests.

A config is the family's own with every size shrunk (`SIZES`) and the family's exceptions on top (`EXCEPTIONS`).
Settings that differ from block to block are mixed irregularly, so that a cut which gives a block another block's
settings changes the logits.
"""

from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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


BLOCKS = 6
DEPTH_KEYS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_blocks",
    "decoder_layers",
    "num_decoder_layers",
)
SLIDING = mixed("sliding_attention", "full_attention")
LINEAR = mixed("linear_attention", "full_attention")
CONVOLUTION = mixed("conv", "full_attention")
HYBRID = mixed("hybrid_sliding", "hybrid")
SPARSE = {"mlp_layer_types": per_block("dense", "sparse", "sparse", "dense", "sparse", "dense")}
INDEXER = {"indexer_types": per_block("full", "shared", "full", "full", "shared", "shared")}
ZAMBA = {"layers_block_type": per_block("linear_attention", "hybrid", "hybrid")}  # one hybrid alone cannot be built
LATENT = {"num_key_value_heads": 4}  # latent attention has as many as query heads
DECODER = {"is_decoder": True}  # BERT's relatives look ahead without it
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28}
RELATIVE = {
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 1,
    "swa_head_dim": 16,
    "rel_extent": 16,
    "d_rel": 4,
}

# Sizes by their names in the library's configs; a config gets those that its class has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"), 97),
    **dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), 97),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("dense_intermediate_size", "intermediate_size_mlp", "dff", "dim_ff", "d_inner"), 48),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    "num_key_value_heads": 2,
    "rotary_dim": 4,
    **dict.fromkeys(("head_dim", "d_head", "dim_head", "attention_head_size", "kv_channels"), 8),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_seq_len", "model_max_length", "context_length"), 64
    ),
    # not the decoder's depth: `num_hidden_layers` of these configs is the encoder's
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), 1),
    # windows shorter than a probe of 12 tokens
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window_size"), 4),
    **dict.fromkeys(("attention_chunk_size", "local_attn_chunk_length", "lsh_attn_chunk_length"), 4),
    # mixtures of experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "num_expert_group", "topk_group"), 1),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 24),
    "shared_experts_intermediate_size": 24,
    # latent and indexed attention; the index keeps fewer tokens than a probe has
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "index_head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "indexer_head_dim"), 8),
    **dict.fromkeys(("index_topk", "indexer_budget"), 4),
    **dict.fromkeys(("index_n_heads", "indexer_n_heads", "index_block_size", "index_topk_blocks"), 2),
    # state spaces, linear attention and short convolutions
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank", "chunk_size", "mamba_chunk_size", "block_size"), 4),
    **dict.fromkeys(("conv_kernel", "conv_kernel_size", "conv_L_cache", "mamba_d_conv", "conv1d_width"), 3),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "use_mamba_kernels": False,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
}

WINDOWS = (
    "cohere2",
    "cwm",
    "exaone4",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "kolibri1",
    "ministral",
    "olmo3",
    "vaultgemma",
)
ENCODERS = (
    "bert",
    "bert-generation",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "roberta",
    "roberta-prelayernorm",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
)
WINDOWED = {"layer_types": SLIDING}
THETAS = {"layer_types": SLIDING, "layer_rope_theta": per_block(10000.0, 100.0, 0)}  # 0: no rotation

EXCEPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(WINDOWS, WINDOWED),
    **dict.fromkeys(ENCODERS, DECODER),
    **dict.fromkeys(("axk1", "deepseek_v32", "glm4_moe_lite"), LATENT | SPARSE),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), LATENT | {"first_k_dense_replace": 2}),
    **dict.fromkeys(("bailing_hybrid", "kimi_linear"), LATENT | SPARSE | {"layer_types": LINEAR}),
    **dict.fromkeys(("beam", "cohere2_moe", "exaone_moe", "mellum", "mimo_v2_flash"), SPARSE | WINDOWED),
    **dict.fromkeys(("qwen2", "qwen3"), WINDOWED | {"use_sliding_window": True}),
    **dict.fromkeys(("granite_swa", "granitemoe_swa"), THETAS),
    "afmoe": {"layer_types": SLIDING, "num_dense_layers": 2},
    "aria_text": {"intermediate_size": 24},
    "axk2": {**LATENT, **SPARSE, "gated_norm_rank": 4},
    "bamba": {"attn_layer_indices": some(1, 4)},
    "big_bird": {**DECODER, "attention_type": "original_full"},
    "cohere_compass_text": {
        "layer_types": SLIDING,
        "rope_parameters": {"sliding_attention": {**ROPE, "mrope_section": [2, 1, 1]}, "full_attention": None},
    },
    "cpmant": {
        "prompt_types": 3,
        "prompt_length": 4,
        "segment_types": 4,
        "position_bias_num_buckets": 16,
        "position_bias_max_distance": 32,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "layer_types": per_block(
            *("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"),
            *("heavily_compressed_attention", "sliding_attention", "compressed_sparse_attention"),
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
        **SPARSE,
        "layer_types": mixed("sliding_attention", "indexed_attention"),
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
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_end_index": 4, "moe_layer_interval": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "flint": {"layer_types": SLIDING, "mlp_only_layers": some(1, 4)},
    "gemma3n_text": {
        "layer_types": SLIDING,
        "intermediate_size": mixed(48, 24),
        "activation_sparsity_pattern": mixed(0.5, 0.0),
        "laurel_rank": 8,
        "num_kv_shared_layers": 2,
    },
    # the full attention blocks have heads of their own (`per_layer_config`)
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), WINDOWED | {"global_head_dim": 16}),
    "git": {"vision_config": TOWER},
    "glm4_moe": {"first_k_dense_replace": 2},
    "glm_moe_dsa": {**LATENT, **SPARSE, **INDEXER},
    "gpt_neo": {"attention_types": lambda depth: [[[kind], 1] for kind in mixed("global", "local")(depth)]},
    "granitemoehybrid": {"layer_types": LINEAR, "position_embedding_type": "rope"},
    # two stacks, run in cycles: `num_hidden_layers` counts the passes
    "hrm_text": {"num_layers_per_stack": lambda depth: depth, "num_hidden_layers": lambda depth: depth * 8},
    "hy_v3": SPARSE,
    "hy_v4": {**SPARSE, **INDEXER, "hc_mult": 2},
    "inkling_text": {**RELATIVE, **SPARSE, "layer_types": HYBRID},
    "inkling2_text": {**RELATIVE, "layer_types": HYBRID, "unpadded_vocab_size": 97, "n_layers_per_attn_res_block": 2},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "laguna": {"layer_types": SLIDING, **SPARSE, "num_attention_heads_per_layer": mixed(4, 2)},
    "lfm2": {"layer_types": CONVOLUTION, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": CONVOLUTION, "num_dense_layers": 2},
    "lfm3": {"layer_types": per_block("conv", "full_attention", "sliding_attention", "sliding_attention", "conv")},
    "llama4_text": {
        "layer_types": mixed("chunked_attention", "full_attention"),
        "no_rope_layers": per_block(1, 1, 0),
        "moe_layers": some(1, 4),
        "intermediate_size": 24,
        "floor_scale": 4,
    },
    "longcat_flash": {**LATENT, "zero_expert_num": 2},
    "mamba2": {"head_dim": 16},
    "minicpm3": LATENT,
    "minimax": {"layer_types": LINEAR, "linear_attn_alpha_factor": 1.5, "mlp_beta_factor": 0.5},
    "minimax_m3_vl_text": {**SPARSE, "layer_types": mixed("full_attention", "minimax_m3_sparse")},
    "modernbert-decoder": {"layer_types": SLIDING, "local_attention": 8},
    "mpt": {"expansion_ratio": 2},
    "nemotron_h": {
        "layers_block_type": per_block("linear_attention", "moe", "full_attention", "mlp", "linear_attention", "moe")
    },
    "olmo_hybrid": {"layer_types": LINEAR, "linear_num_key_heads": 4},
    "phi4_multimodal": {
        "vision_config": {**TOWER, "crop_size": 28, "feature_layer": 0},
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_blocks": 1,
            "num_attention_heads": 4,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 32,
        },
    },
    "prophetnet": {"num_buckets": 8, "relative_max_distance": 16},
    "qwen2_moe": {"use_sliding_window": True, "layer_types": SLIDING, "mlp_only_layers": some(1, 4)},
    "qwen3_5_text": {"layer_types": LINEAR},
    "qwen3_5_moe_text": {"layer_types": LINEAR},
    "qwen3_moe": {"mlp_only_layers": some(1, 4)},
    "qwen3_next": {"layer_types": LINEAR, "mlp_only_layers": some(1, 4)},
    "qwen4_exp_text": {
        "layer_types": per_block("linear_attention", "indexed_attention", "linear_attention"),
        "ple_layer_ids": lambda depth: [index + 1 for index in some(0, 3)(depth)],  # these count from 1
        "ple_embed_dim": 16,
        "ngram_size": 2,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 4,
        "split_ngram_parts": 1,
        "hc_count": 2,
        "hc_lowrank": 8,
        "indexer_kv_heads": 1,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": mixed("recurrent", "attention"), "lru_width": 32},
    "reformer": {
        **DECODER,
        "attn_layers": mixed("local", "lsh"),
        "feed_forward_size": 48,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "num_buckets": 2,
        "hash_seed": 1,  # without it every pass draws new hashes
    },
    "rembert": {**DECODER, "input_embedding_size": 16, "output_embedding_size": 24},
    "roc_bert": {**DECODER, "pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    # with a rescaling, the first pass divides weights in place, which changes the saved model
    "rwkv": {"attention_hidden_size": 32, "rescale_every": 0},
    "smollm3": {"use_sliding_window": True, "layer_types": SLIDING, "no_rope_layers": per_block(1, 1, 0)},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xmod": {**DECODER, "default_language": "en_XX"},
    "youtu": {**LATENT, "pad_token_id": None},  # loading sets the row of a padding token to zero
    "zamba": {**ZAMBA, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {**ZAMBA, **LATENT, "adapter_rank": 4},
    "zaya": {"layer_types": HYBRID, "num_experts_per_tok": 1, "router_hidden_size": 16},
}

# A second interesting config of a family, on top of its exceptions.
VARIANTS: dict[str, dict[str, Any]] = {
    "doge+moe": {"is_moe": True},
    "dots3_note_text+full_attention": {"use_dsa": False},
    "falcon+alibi": {"alibi": True},
    "falcon+new_decoder": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "flint+decoder_sparse_step": {"decoder_sparse_step": 2, "mlp_only_layers": []},
    "gemma3n_text+no_kv_shared": {"num_kv_shared_layers": 0},
    "gemma4_text+k_eq_v": {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "gemma4_text+kv_shared": {"num_kv_shared_layers": 2, "use_double_wide_mlp": True},
    "gemma4_text+moe": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "gemma4_text+no_per_layer_input": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
    "gemma4_unified_text+kv_shared": {"num_kv_shared_layers": 2},
    "glm_moe_dsa+all_full": {"indexer_types": per_block("full")},
    "gpt2+inverse_layer_idx": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_bigcode+multihead": {"multi_query": False},
    "gpt_neox+sequential": {"use_parallel_residual": False},
    "hunyuan_v1_moe+topk_per_block": {"moe_topk": mixed(2, 1)},
    "hy_v4+all_full": {"indexer_types": per_block("full")},
    "inkling_text+local_layer_ids": {"layer_types": None, "local_layer_ids": some(0, 3)},
    "kimi_linear+linear_attn_config": {
        "layer_types": None,
        "mlp_layer_types": None,
        "first_k_dense_replace": 2,
        "linear_attn_config": {"full_attn_layers": [2, 5], "kda_layers": [1, 3, 4, 6], "head_dim": 8, "num_heads": 4},
    },
    "lfm2+full_attn_idxs": {"layer_types": None, "full_attn_idxs": some(1, 4)},
    "llama4_text+all_moe": {"moe_layers": None},
    "llama4_text+interleave": {"moe_layers": None, "interleave_moe_layer_step": 2},
    "opt+post_norm": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "qwen2+max_window_layers": {"layer_types": None, "max_window_layers": 3},
    "qwen2_moe+decoder_sparse_step": {"decoder_sparse_step": 2, "mlp_only_layers": []},
    "qwen3_moe+decoder_sparse_step": {"decoder_sparse_step": 2, "mlp_only_layers": []},
    "qwen3_next+decoder_sparse_step": {"decoder_sparse_step": 2, "mlp_only_layers": []},
    "qwen4_exp_text+no_ple": {"ple_layer_ids": []},
    "recurrent_gemma+pattern": {"block_types": ["recurrent", "recurrent", "attention"]},
    "smollm3+interval": {"layer_types": None, "no_rope_layers": None, "no_rope_layer_interval": 3},
    "stablelm+parallel": {"use_parallel_residual": True, "qk_layernorm": True},
    "zamba2+two_shared": {"num_mem_blocks": 2, "use_shared_attention_adapter": True},
}

WRAPPER = "its text model is in text_config, beside towers of another modality"
TEXT_ONLY = "a wrapper that the library loads as {}"
COMPOSITE = "a text encoder, an audio codec and a decoder in one config"
DRAFT = "a draft model: its forward needs the main model's keys and values"
NOT_TINY: dict[str, str] = {
    "blt": "a byte patcher, two local stacks and a global one, each with a config of its own",
    "emu3": "its text model's type cannot be loaded again",
    "mllama": "its text model's type cannot be loaded again",
    "gemma3n": "its image tower needs the timm package",
    **dict.fromkeys(("fuyu", "gemma3", "gemma4", "gemma4_unified", "got_ocr2"), WRAPPER),
    "moss_transcribe_diarize": WRAPPER,
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), DRAFT),
    **dict.fromkeys(("musicgen", "musicgen_melody"), COMPOSITE),
    **{
        name: TEXT_ONLY.format(f"{name}_text")
        for name in ("dots3_note", "llama4", "qwen3_5", "qwen3_5_moe", "qwen4_exp")
    },
}
TINY = tuple(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in NOT_TINY)


def tiny_config(model_type: str, num_blocks: int = BLOCKS) -> PreTrainedConfig:
    """Make a tiny config.

    Args:
        model_type: One of `TINY` or `VARIANTS`.
        num_blocks: Blocks of the causal language model.
    """
    family = model_type.partition("+")[0]
    known = AutoConfig.for_model(family)
    defaults = known.to_dict()
    values: dict[str, Any] = {key: value for key, value in SIZES.items() if key in defaults}
    values |= {key: num_blocks for key in DEPTH_KEYS if key in defaults}
    values |= {key: 0.0 for key, value in defaults.items() if "drop" in key and isinstance(value, float)}
    values |= EXCEPTIONS.get(family, {}) | VARIANTS.get(model_type, {})
    return type(known)(**{key: value(num_blocks) if callable(value) else value for key, value in values.items()})


def random_model(model_type: str, *, seed: int = 3, but: str = "never") -> PreTrainedModel:
    """Make a tiny model in which every parameter is changed, except those whose names begin with `but`."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(model_type))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(but):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def own_memory(model: nn.Module) -> None:
    """Copy every mapped tensor: CPU kernels may round differently at another alignment."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
