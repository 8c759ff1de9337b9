"""Launched by tests: saves small states under several layouts, and loads each into engines of several layouts.

`drive_elastic.py FOLDER LAYOUT,... [LAYOUT,...]`: saves under each of the first list after two updates, then loads
every state below FOLDER into an engine of each of the second, and writes to FOLDER/loaded-<ranks>.json what each engine
held, a sha256 over masters, moments and weights as whole tensors, by name, and the losses of two more updates.

A layout is a ZeRO stage, a precision and letters: `2bf16o` offloads the optimizer, `3fp32s` cuts into small groups,
`1bf16a` accumulates in bf16.
"""

import argparse
import gc
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from inheritune_ds.config.messages import validate
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.config.yaml import parse_yaml
from inheritune_ds.distributed.environment import prepare_environment
from inheritune_ds.distributed.world import World, detect, export

RECIPE = """
name: elastic
description: a tiny llama
target: {shape: {model_type: llama, vocab_size: 257, hidden_size: 12, num_hidden_layers: 2, num_attention_heads: 2,
                 intermediate_size: 20, max_position_embeddings: 16}}
corpus: {sources: [{kind: embedded}], tokenizer: {vocab_size: 257}}
training: {seq_len: 8, global_batch_tokens: 64, duration: 4 steps}
optimizer: {lr: 3.0e-3}
schedule: {kind: constant, warmup_steps: 0}
validation: {interval_steps: 4, max_tokens: 64}
checkpoint: {interval_steps: 4}
"""
WINDOWS = 8


def build(layout: str, world: World, seed: int) -> Any:
    """An engine of a layout."""
    import torch
    from transformers import AutoModelForCausalLM

    from inheritune_ds.config.deepspeed import Machine, resolve
    from inheritune_ds.plan.shapes import target_shape
    from inheritune_ds.surgery.load import build_config
    from inheritune_ds.training.engine import Engine
    from inheritune_ds.training.kernels import choose_kernels

    recipe = validate(Recipe, parse_yaml(RECIPE, "elastic"), "elastic")
    stage, rest = int(layout[0]), layout[1:]
    precision, letters = rest[:4], rest[4:]
    zero: dict[str, Any] = {"stage": stage}
    if "o" in letters:
        zero["offload_optimizer"] = {"device": "cpu"}
    if "s" in letters:
        zero["sub_group_size"] = 500
    document = {
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16"},
        "data_types": {"grad_accum_dtype": "bf16" if "a" in letters else "fp32"},
        "train_micro_batch_size_per_gpu": 2,
    }
    resolved = resolve(
        document,
        recipe,
        origin="test",
        shape=target_shape(recipe),
        world_size=world.size,
        machine=Machine("cpu", 8.0, bf16=True),
    )
    assert recipe.target.shape is not None
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(build_config(recipe.target.shape))
    kernels, _ = choose_kernels(
        resolved.kernels,
        config=model.config,
        device=torch.device("cpu"),
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        zero_stage=stage,
        offload="o" in letters,
        run_flops=None,
    )
    return Engine(model, resolved.config, world, kernels)


def update(engine: Any, world: World, number: int) -> float:
    """One update on windows that depend on its number alone; the loss."""
    import torch

    generator = torch.Generator().manual_seed(number)
    windows = torch.randint(0, 257, (WINDOWS, 9), generator=generator)
    own = windows.view(-1, world.size, 2, 9)[:, world.rank]
    return float(engine.train_step(list(own), lr=1e-3).loss)


def digest(engine: Any) -> dict[str, str]:
    """sha256 of every parameter's master, moments and rounded weight, as whole tensors."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {}
    optimizer = engine._engine.optimizer
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        # DeepSpeed links the moments of all groups after the first update of the first group, before others have any.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            values = [parameter.detach().clone()]
        values.append(safe_get_full_fp32_param(parameter))
        values += [safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")]
        joined = b"".join(value.float().cpu().numpy().tobytes() for value in values)
        found[name] = hashlib.sha256(joined).hexdigest()
    return found


def save(engine: Any, folder: Path) -> None:
    """Write a state as a checkpoint holds it."""
    import torch

    for name, shard in engine.capture().shards.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(shard, folder / name)


def main() -> None:
    """Save and load what the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("saved")
    parser.add_argument("loaded")
    args = parser.parse_args()
    world = detect(os.environ)
    export(world, os.environ)
    prepare_environment(os.environ, kind="cpu")
    from inheritune_ds.distributed.process_group import leave_process_group, start_process_group

    start_process_group(world)
    gc.freeze()  # DeepSpeed collects garbage while it builds an engine, and what was imported is most of it
    told: dict[str, Any] = {}
    for layout in filter(None, args.saved.split(",")):
        engine = build(layout, world, seed=1)
        for number in (0, 1):
            update(engine, world, number)
        name = f"{layout}-{world.size}"
        save(engine, args.folder / name)
        told[name] = {"digest": digest(engine), "losses": [update(engine, world, number) for number in (2, 3)]}
        engine.close()
    start_process_group(world)  # all files are there
    states = sorted(path for path in args.folder.iterdir() if path.is_dir())
    for layout in filter(None, args.loaded.split(",")):
        engine = build(layout, world, seed=2)
        for state in states:  # one after the other into the same engine, as a rollback does
            if layout[1:5] in state.name:
                notes = engine.load(state)
                found = {"digest": digest(engine), "step": engine._engine.global_steps, "notes": notes}
                told[f"{state.name} -> {layout}"] = {**found, "losses": [update(engine, world, n) for n in (2, 3)]}
        engine.close()
    if world.is_main:
        (args.folder / f"loaded-{world.size}.json").write_text(json.dumps(told), encoding="utf-8")
    leave_process_group()


if __name__ == "__main__":
    main()
