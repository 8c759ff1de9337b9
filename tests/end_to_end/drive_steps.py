"""Launched by tests: the real loop on the golden tokens, for several ZeRO stages in one process group.

`python drive_steps.py OUT.json STAGE[,STAGE...] STEPS [PRECISION]`; a stage with a `d` keeps documents apart.
Each rank writes {run label: {"losses": [...], "grad_norms": [...], "weights_sha256": str, ...}}.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from benchmarks.ranks import join_ranks
from inheritune_ds.config.messages import validate
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.distributed.world import World
from inheritune_ds.tracking.recorder import Recorder
from tests import tiny

END_OF_DOCUMENT = 25
"""About every 29th token."""
Ids = NDArray[np.int64]
GOLDEN = Path(__file__).parent.parent / "golden"
RECIPE = tiny.document(
    name="golden",
    seed=7,
    target={"shape": {**tiny.LLAMA, "num_key_value_heads": 2}},
    schedule={"kind": "cosine", "warmup_steps": 5},
    validation={"interval_steps": 1000, "max_tokens": 512},
    logging={"interval_steps": 1},
)


class Collector(Recorder):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        self.rows.append({"step": step, "tokens": tokens, **values})


def run_stage(world: World, recipe: Recipe, named: str, precision: str, folder: Path) -> dict[str, Any]:
    import torch

    from benchmarks.program import loop_parts
    from inheritune_ds.checkpoints.train_state import SavedLayout
    from inheritune_ds.data.stream.windows import SourceTokens
    from inheritune_ds.surgery.compare import weights_sha256
    from inheritune_ds.training.loop import train
    from inheritune_ds.training.packing import DocumentPacking

    stage, packing = int(named[0]), DocumentPacking(END_OF_DOCUMENT) if named.endswith("d") else None
    given = dict(tiny.model(recipe).named_parameters())
    engine = tiny.engine(recipe, world, stage=stage, precision=precision, packing=packing)
    masters_exact = all(torch.equal(given[name], value) for name, value in engine.full_parameters())
    collector = Collector()
    parts = loop_parts(
        recipe,
        engine,
        collector,
        tokens=GOLDEN / "tokens.bin",
        folder=folder,
        layout=SavedLayout(world.size, stage, precision),
        micro_batch=2,
        validation_batch=3,
        packing=packing,
    )
    seen: list[list[int]] = []
    read = SourceTokens.read

    def recording(tokens: SourceTokens, sources: Ids, starts: Ids) -> Ids:
        seen.append((starts // recipe.training.seq_len).tolist())
        return read(tokens, sources, starts)

    with patch.object(SourceTokens, "read", recording):
        train(parts, recipe.training.duration.amount, None)
    state = dict(engine.full_parameters())
    engine.close()
    rows = [row for row in collector.rows if "train/loss" in row]
    return {
        "losses": [row["train/loss"] for row in rows],
        "grad_norms": [row["train/grad_norm"] for row in rows],
        "validation": [row["val/loss"] for row in collector.rows if "val/loss" in row],
        "weights_sha256": weights_sha256(state),
        "own_windows": seen,
        "masters_exact": masters_exact,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("stages")
    parser.add_argument("steps", type=int)
    parser.add_argument("precision", nargs="?", default="fp32")
    parser.add_argument("--local_rank", type=int)
    args = parser.parse_args()
    training = {**RECIPE["training"], "duration": f"{args.steps} steps"}
    recipe = validate(Recipe, {**RECIPE, "training": training}, "golden")
    world = join_ranks()
    from inheritune_ds.distributed.process_group import end_rank

    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        shared = Path(os.environ.get("DRIVE_SCRATCH", scratch))
        for number, stage in enumerate(args.stages.split(",")):
            (shared / str(number)).mkdir(parents=True, exist_ok=True)
            results[f"{number}:zero{stage}"] = run_stage(world, recipe, stage, args.precision, shared / str(number))
    args.out.with_suffix(f".rank{world.rank}.json").write_text(json.dumps(results), encoding="utf-8")
    end_rank()


if __name__ == "__main__":
    main()
