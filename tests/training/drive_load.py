"""Launched by tests: train the same target whole and partitioned. `drive_load.py FOLDER` writes FOLDER/rankN.json.

Each case is a family, a precision and offload; `whole` is a model that every rank loads in fp32 and DeepSpeed
partitions, `partitioned` one that is read by partition.
"""

import argparse
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.ranks import join_ranks
from inheritune_ds.distributed.world import World
from tests import tiny

ODD = {"hidden_size": 30, "num_attention_heads": 3, "intermediate_size": 65}
"""Some parameters have a number of elements that is no multiple of 4 or 2, so that the last rank has padding."""
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {**tiny.LLAMA, **ODD, "num_key_value_heads": 1},
    "llama tied": {**tiny.LLAMA, **ODD, "tie_word_embeddings": True},
    "gpt2": {**tiny.LLAMA, **ODD, "model_type": "gpt2", "tie_word_embeddings": True},
}
CASES = [(family, precision, "") for family in SHAPES for precision in ("fp32", "bf16")]
CASES += [("llama", "bf16", "offload"), ("gpt2", "fp32", "offload"), ("llama", "bf16", "bf16 files")]
OFFLOAD = {name: {"device": "cpu", "pin_memory": True} for name in ("offload_optimizer", "offload_param")}
STEPS = 5


def write(recipe: Any, folder: Path, dtype: str) -> None:
    """A model's files, as surgery leaves them."""
    import torch

    tiny.model(recipe).to(getattr(torch, dtype)).save_pretrained(folder)


def train(world: World, recipe: Any, target: Path, precision: str, how: str, *, whole: bool) -> dict[str, Any]:
    """Losses, norms, validation loss and a hash of the masters after a few steps."""
    import torch

    from inheritune_ds.surgery.load import load_model
    from inheritune_ds.training.load import load_target

    def load(folder: Path, config: Mapping[str, Any]) -> Any:
        return load_model(folder, dtype="float32") if whole else load_target(folder, config)

    zero = OFFLOAD if how == "offload" else {}
    keys: dict[str, Any] = {"zero_optimization": {**zero, "stage3_param_persistence_threshold": 100}}
    engine = tiny.engine(recipe, world, stage=3, precision=precision, target=target, load=load, **keys)
    start = {name: value.clone() for name, value in engine.full_parameters()}
    buffers = {name: buffer.tolist() for name, buffer in engine.module.named_buffers()}
    steps = []
    for number in range(STEPS):
        windows = torch.randint(0, 257, (16, 33), generator=torch.Generator().manual_seed(number))
        own = windows.view(-1, world.size, 2, 33)[:, world.rank]
        torch.manual_seed(number)  # GPT-2's dropout
        result = engine.train_step(list(own), lr=3e-3)
        steps.append((result.loss, result.grad_norm))
    [losses] = engine.window_losses([windows[:2].numpy()])
    found = {
        "steps": steps,
        "validation": losses.tolist(),
        "buffers": buffers,
        "loss": engine.kernels.loss,
        "start": digest(start.items()),
        "masters": digest(engine.full_parameters()),
    }
    engine.close()
    return found


def refused(world: World, recipe: Any, target: Path) -> str:
    """The error for a target whose file lacks a tensor."""
    import torch.distributed as dist
    from safetensors.torch import load_file, save_file

    from inheritune_ds.errors import SurgeryError
    from inheritune_ds.training.load import load_target

    path = target / "model.safetensors"
    if world.is_main:
        tensors = load_file(path)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, path, metadata={"format": "pt"})
    dist.barrier()
    try:
        tiny.engine(recipe, world, stage=3, target=target, load=load_target)
    except SurgeryError as error:
        return error.problem
    return ""


def digest(named: Any) -> dict[str, str]:
    """sha256 of tensors by name."""
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in named}


def main() -> None:
    """Run every case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--local_rank", type=int)
    folder = parser.parse_args().folder
    world = join_ranks()
    import torch.distributed as dist

    from inheritune_ds.distributed.process_group import end_rank

    found: dict[str, Any] = {}
    for family, precision, how in CASES:
        recipe = tiny.recipe(target={"shape": SHAPES[family]})
        dtype = "bfloat16" if how == "bf16 files" else "float32"
        target = folder / f"{family} {dtype}"
        if world.is_main:
            write(recipe, target, dtype)
        dist.barrier()
        found[f"{family} {precision} {how}".strip()] = {
            name: train(world, recipe, target, precision, how, whole=name == "whole")
            for name in ("whole", "partitioned")
        }
    found["refused"] = refused(world, tiny.recipe(target={"shape": SHAPES["llama"]}), folder / "llama float32")
    (folder / f"rank{world.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    end_rank()


if __name__ == "__main__":
    main()
