"""Models, recipes and engines that train in seconds on one core."""

import json
import random
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from inheritune_ds.config.messages import validate
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.distributed.world import World

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
_WORDS = ("the", "a", "small", "old", "red", "cat", "dog", "bird", "tree", "river", "runs", "sees", "eats", "often")


def document(**sections: Any) -> dict[str, Any]:
    """A recipe of 50 steps of 512 bytes; keyword arguments replace sections."""
    return {
        "name": "tiny",
        "description": "a test",
        "target": {"shape": LLAMA},
        "corpus": {"sources": [{"kind": "embedded"}], "tokenizer": {"vocab_size": 257}},
        "training": {"seq_len": 32, "global_batch_tokens": 512, "duration": "50 steps"},
        "optimizer": {"lr": 3e-3},
        "schedule": {"kind": "constant"},
        "validation": {"interval_steps": 1000},
        "checkpoint": {"interval_steps": 1000},
        **sections,
    }


def recipe(**sections: Any) -> Recipe:
    return validate(Recipe, document(**sections), "tiny")


def write_corpus(path: Path) -> Path:
    """400 documents of a few hundred words each, from a small grammar with a fixed seed."""
    draw = random.Random(5)
    with path.open("w", encoding="utf-8") as file:
        for number in range(400):
            text = " ".join(draw.choice(_WORDS) for _ in range(draw.randint(50, 150)))
            file.write(json.dumps({"text": f"Story {number}. {text}."}) + "\n")
    return path


def model(recipe: Recipe) -> Any:
    """The recipe's shape with weights drawn by its seed."""
    import torch
    from transformers import AutoModelForCausalLM

    from inheritune_ds.surgery.load import build_config

    assert recipe.target.shape is not None
    torch.manual_seed(recipe.seed)
    return AutoModelForCausalLM.from_config(build_config(recipe.target.shape))


def resolve(
    recipe: Recipe,
    world: World,
    *,
    stage: int = 1,
    precision: str = "fp32",
    micro_batch: int = 2,
    device: str = "cpu",
    **keys: Any,
) -> Any:
    """The DeepSpeed config of `engine`, resolved."""
    from inheritune_ds.config.deepspeed import Machine, resolve
    from inheritune_ds.plan.shapes import target_shape

    document = {
        "zero_optimization": {"stage": stage, **keys.pop("zero_optimization", {})},
        "bf16": {"enabled": precision == "bf16", **keys.pop("bf16", {})},
        "train_micro_batch_size_per_gpu": micro_batch,
        **keys,
    }
    machine = Machine("cpu" if device == "cpu" else "cuda", 8.0, bf16=True)
    return resolve(document, recipe, origin="test", shape=target_shape(recipe), world_size=world.size, machine=machine)


def engine(
    recipe: Recipe,
    world: World,
    *,
    precision: str = "fp32",
    device: str = "cpu",
    packing: Any = None,
    fp16: Mapping[str, Any] = MappingProxyType({}),
    target: Path | None = None,
    load: Callable[[Path, Mapping[str, Any]], Any] | None = None,
    carried: Collection[str] = (),
    **keys: Any,
) -> Any:
    """An engine in an existing process group: for `model`, or for the one in `target`, which `load` reads.

    Precision is fp32, bf16, or fp16, which the project refuses on a CPU. `fp16` and `keys` are blocks and keys of the
    DeepSpeed config; `stage` and `micro_batch` stand for theirs.
    """
    import torch

    from inheritune_ds.training.engine import Engine
    from inheritune_ds.training.kernels import choose_kernels

    resolved = resolve(recipe, world, precision=precision, device=device, **keys)
    built = model(recipe) if load is None or target is None else load(target, resolved.config)
    kernels, _ = choose_kernels(
        resolved.kernels,
        config=built.config,
        device=torch.device(device),
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision],
        zero_stage=resolved.zero_stage,
        offload=resolved.offloads_optimizer,
        run_flops=None,
    )
    config = resolved.config
    if precision == "fp16":
        config = {**config, "fp16": {**config["fp16"], "enabled": True, **fp16}}
    return Engine(built, config, world, kernels, packing, target=target, carried=carried)
