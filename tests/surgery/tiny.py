"""Tiny models of several families, every tensor random, and targets that are cut from them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from inheritune_ds.config.model import Reference, Target
from inheritune_ds.storage.files import sha256_file
from inheritune_ds.surgery.inherit import Cut, TargetModel, build_target
from inheritune_ds.surgery.load import load_config
from inheritune_ds.surgery.reference import ReferenceModel, locate

SaveReference = Callable[..., Path]
Build = Callable[..., TargetModel]
VOCABULARY = 40
IDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
FAMILIES: dict[str, dict[str, Any]] = {
    # with scale_attn_by_inverse_layer_idx a block depends on its index, as in the paper's GPT-2 track
    "gpt2": {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 32, "scale_attn_by_inverse_layer_idx": True},
    "llama": {**WIDE, "num_key_value_heads": 1},
    # the last two blocks look 4 tokens back only
    "qwen2": {
        **WIDE,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 2,
        "num_key_value_heads": 2,
    },
    # every fourth block has no rotary embedding
    "smollm3": {**WIDE, "num_key_value_heads": 1},
    "opt": {**WIDE, "ffn_dim": 24, "word_embed_proj_dim": 8},
    "gpt_neox": WIDE,
}
PATHS = {
    "gpt2": "transformer.h",
    "llama": "model.layers",
    "qwen2": "model.layers",
    "smollm3": "model.layers",
    "opt": "model.decoder.layers",
    "gpt_neox": "gpt_neox.layers",
}
TIED = {"gpt2", "qwen2", "smollm3", "opt"}
IDENTITY = {"recipe": "one"}


def randomize(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Give every tensor random values, also norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    model.eval()
    return model


def make_model(family: str, *, seed: int = 5, dtype: str = "float32", **changes: Any) -> PreTrainedModel:
    """Make a tiny model."""
    values = {**IDS, **FAMILIES[family], "tie_word_embeddings": family in TIED, **changes}
    config = AutoConfig.for_model(family, **values)
    return randomize(AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)), seed)


def make_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer of `size` words."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = special + [f"w{number}" for number in range(size - len(special))]
    model = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def cut(
    folder: Path | None,
    to: Path,
    *,
    seed: int = 1,
    words: int | None = VOCABULARY,
    previous: ReferenceModel | None = None,
    **target: Any,
) -> TargetModel:
    """Build a target from a saved reference; `folder=None` is from scratch."""
    part = Target(**target)
    located = locate(Reference(model=str(folder)), Path) if folder else None
    cut = Cut(
        target=part,
        seed=seed,
        identity=IDENTITY,
        command="make it",
        reference=None if part.inherits_nothing else located,
        reference_config=load_config(folder) if folder else None,
        previous=previous,
        tokenizer=make_tokenizer(words) if words else None,
    )
    return build_target(cut, to)


def plain(folder: Path) -> PreTrainedModel:
    """Load with plain transformers; no tensor may be missing or unexpected."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    model: PreTrainedModel
    model, info = loaded
    assert {key: list(value) for key, value in info.items() if value} == {}
    model.eval()
    return model


def block_output(model: PreTrainedModel, block: str) -> torch.Tensor:
    """Output of a block, for more tokens than any attention window."""
    caught: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple | list) else output)

    with torch.no_grad():
        handle = model.get_submodule(block).register_forward_hook(keep)
        model(input_ids=torch.arange(24).view(2, 12) + 3, use_cache=False)
        handle.remove()
    return caught[0]


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a config.json; None removes one."""
    path = folder / "config.json"
    values = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}), encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a model.safetensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def shard(folder: Path, count: int = 2, *, pickled: bool = False) -> list[Path]:
    """Distribute the tensors of a model.safetensors over shards with an index; return their paths."""
    single = folder / "model.safetensors"
    tensors = load_file(single)
    single.unlink()
    stem, suffix, index = (
        ("pytorch_model", "bin", "pytorch_model.bin.index.json")
        if pickled
        else ("model", "safetensors", "model.safetensors.index.json")
    )
    files = [folder / f"{stem}-{number:05d}-of-{count:05d}.{suffix}" for number in range(1, count + 1)]
    for number, file in enumerate(files):
        part = {name: tensor for place, (name, tensor) in enumerate(tensors.items()) if place % count == number}
        torch.save(part, file) if pickled else save_file(part, file, metadata={"format": "pt"})
    listed = {name: files[place % count].name for place, name in enumerate(tensors)}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": listed}), encoding="utf-8")
    return files
