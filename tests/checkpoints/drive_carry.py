"""Launched by tests: trains a model of one block, and carries its optimizer state to one of two.

`drive_carry.py FOLDER STAGE,...`: in each ZeRO stage, trains the smaller model for SOURCE_STEPS updates and saves it;
then gives its state to the larger one, trains that for two updates, saves it, and does the third. It then loads every
state of a larger model below FOLDER, of other ranks and stages, and does the third update there. It writes the masters
after each update to FOLDER/RANKS.safetensors.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.ranks import join_ranks
from inheritune_ds.distributed.world import World
from tests import tiny
from tests.checkpoints.drive_reshard import SHAPE, WINDOWS, save

SOURCE_STEPS, STEPS, LR = 5, 3, 1e-3
BETAS = (0.9, 0.999)
RECIPE = {
    "training": {"seq_len": 8, "global_batch_tokens": 64, "duration": "8 steps"},
    "optimizer": {"lr": LR, "betas": list(BETAS), "max_grad_norm": 0.0},
}


def recipe(blocks: int) -> Any:
    return tiny.recipe(seed=blocks, target={"shape": {**SHAPE, "num_hidden_layers": blocks}}, **RECIPE)


def carried_names(model: Any) -> dict[str, str]:
    """The smaller model's block becomes the last one of the larger; block 0 is new."""
    return {
        name: name.replace("layers.1.", "layers.0.") for name, _ in model.named_parameters() if "layers.0." not in name
    }


def windows(number: int) -> Any:
    """Windows of update `number`, which depend on it alone, as the global batch."""
    import torch

    return torch.randint(0, 257, (WINDOWS, 9), generator=torch.Generator().manual_seed(number))


def update(engine: Any, world: World, number: int) -> None:
    own = windows(number).view(-1, world.size, 2, 9)[:, world.rank]
    engine.train_step(list(own), lr=LR)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("stages")
    args = parser.parse_args()
    world = join_ranks()
    from safetensors.torch import save_file

    from inheritune_ds.checkpoints.store import CheckpointStore
    from inheritune_ds.distributed.process_group import end_rank, start_process_group

    names = carried_names(tiny.model(recipe(2)))
    found: dict[str, Any] = {}

    def keep(engine: Any, title: str) -> None:
        found.update({f"{title}|{name}": value.clone() for name, value in engine.full_parameters()})

    def intact(folder: Path) -> Any:
        start_process_group(world)  # all files are there
        return CheckpointStore(folder, keep=1).newest_intact()

    for stage in map(int, args.stages.split(",")):
        layout, own = f"{stage}fp32", f"{stage}-{world.size}"
        engine = tiny.engine(recipe(1), world, stage=stage)
        for number in range(SOURCE_STEPS):
            update(engine, world, number)
        save(engine, world, layout, args.folder / f"source-{own}")
        engine.close()
        engine = tiny.engine(recipe(2), world, stage=stage, carried=names)
        engine.carry(intact(args.folder / f"source-{own}"), names)
        for number in range(SOURCE_STEPS, SOURCE_STEPS + STEPS):
            if number == SOURCE_STEPS + STEPS - 1:
                save(engine, world, layout, args.folder / f"grown-{own}")
            update(engine, world, number)
            keep(engine, f"{own}|{number - SOURCE_STEPS}")
        engine.close()
    start_process_group(world)
    for stage in map(int, args.stages.split(",")):
        engine = tiny.engine(recipe(2), world, stage=stage, carried=names)
        for state in sorted(args.folder.glob("grown-*")):
            engine.load(intact(state))
            update(engine, world, SOURCE_STEPS + STEPS - 1)
            keep(engine, f"{state.name} -> {stage}-{world.size}|{STEPS - 1}")
        engine.close()
    if world.is_main:
        save_file(found, args.folder / f"{world.size}.safetensors")
    end_rank()


if __name__ == "__main__":
    main()
