"""Convert llama2.c's `.bin` model and tokenizer files to Hugging Face's formats.

Layout: karpathy/llama2.c at 350e04f, export.py (legacy_export) and tokenizer.py (export).
"""

import importlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def convert_model(source: Path, folder: Path) -> LlamaForCausalLM:
    """Write a LLaMA folder from a llama2.c model file; return the model."""
    content = source.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("<7i", content[:28])
    assert vocab > 0, "the head is shared with the embeddings"
    numbers = np.frombuffer(content, dtype="<f4", offset=28)
    position = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal position
        count = int(np.prod(shape))
        position += count
        return torch.from_numpy(numbers[position - count : position].reshape(shape).copy())

    def unrotate(weights: torch.Tensor, groups: int) -> torch.Tensor:
        """llama2.c rotates neighboring pairs, Hugging Face the two halves of a head."""
        rows = weights.shape[0]
        return weights.view(groups, rows // groups // 2, 2, dim).transpose(1, 2).reshape(rows, dim)

    kv_dim = dim // heads * kv_heads
    state = {"model.embed_tokens.weight": take(vocab, dim)}
    parts = {
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": take(layers, dim, dim),
        "self_attn.k_proj": take(layers, kv_dim, dim),
        "self_attn.v_proj": take(layers, kv_dim, dim),
        "self_attn.o_proj": take(layers, dim, dim),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, hidden, dim),
        "mlp.down_proj": take(layers, dim, hidden),
        "mlp.up_proj": take(layers, hidden, dim),
    }
    for name, stacked in parts.items():
        for layer in range(layers):
            groups = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(name)
            weight = unrotate(stacked[layer], groups) if groups else stacked[layer]
            state[f"model.layers.{layer}.{name}.weight"] = weight.contiguous()
    state["model.norm.weight"] = take(dim)
    take(2, length, dim // heads // 2)  # the tables of sines and cosines, which Hugging Face computes
    assert position == len(numbers), "the file holds nothing else"
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(state, strict=True)
    model.save_pretrained(folder)
    return model


def convert_tokenizer(source: Path, folder: Path) -> None:
    """Write `tokenizer.model` (SentencePiece) from a llama2.c tokenizer file."""
    content, position, pieces = source.read_bytes(), 4, []
    while position < len(content):
        score, size = struct.unpack_from("<fi", content, position)
        pieces.append((content[position + 8 : position + 8 + size].decode(), score))
        position += 8 + size
    spm: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")  # generated code without types
    model = spm.ModelProto()
    kinds = spm.ModelProto.SentencePiece.Type
    for number, (text, score) in enumerate(pieces):
        piece = model.pieces.add()
        piece.score = score
        if number < 3:
            piece.piece = ("<unk>", "<s>", "</s>")[number]
            piece.type = kinds.UNKNOWN if number == 0 else kinds.CONTROL
        elif len(text) == 6 and text.startswith("<0x"):
            piece.piece, piece.type = text, kinds.BYTE
        else:
            piece.piece, piece.type = text.replace(" ", "\u2581"), kinds.NORMAL
    trainer = model.trainer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = spm.TrainerSpec.ModelType.BPE, len(pieces), True
    trainer.unk_id, trainer.bos_id, trainer.eos_id = 0, 1, 2
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
