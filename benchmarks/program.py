"""The program's kernels and training loop outside a run folder, for benchmarks and for drivers of tests."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from inheritune_ds.checkpoints.saver import Saver
from inheritune_ds.checkpoints.store import CheckpointStore
from inheritune_ds.checkpoints.train_state import SavedLayout
from inheritune_ds.config.deepspeed import Resolved
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.config.reliability import Reliability
from inheritune_ds.data.stream.batches import BatchStream
from inheritune_ds.data.stream.validation_windows import HeldOut
from inheritune_ds.data.stream.windows import Windows
from inheritune_ds.distributed.signals import StopSignal
from inheritune_ds.distributed.watchdog import Watchdog
from inheritune_ds.tracking.recorder import Recorder
from inheritune_ds.training.engine import Engine
from inheritune_ds.training.kernels import Kernels, choose_kernels
from inheritune_ds.training.loop import LoopParts
from inheritune_ds.training.requests import Controls
from inheritune_ds.training.validation import Validator


def kernels_of(
    resolved: Resolved, model: PreTrainedModel, device: str, run_tokens: int
) -> tuple[Kernels, tuple[str, ...]]:
    """Kernels of a bf16 run on one rank, and a line on each."""
    return choose_kernels(
        resolved.kernels,
        config=model.config,
        device=torch.device(device),
        dtype=torch.bfloat16,
        zero_stage=resolved.zero_stage,
        offload=resolved.offloads_optimizer,
        run_flops=6.0 * model.num_parameters() * run_tokens,
    )


def loop_parts(  # noqa: PLR0913 - each differs between its callers
    recipe: Recipe,
    engine: Engine,
    recorder: Recorder,
    *,
    tokens: Path,
    folder: Path,
    layout: SavedLayout,
    micro_batch: int,
    validation_batch: int = 2,
    packing: Any = None,
) -> LoopParts:
    """Parts of the loop on the windows of one token file (uint16), which is trained on and validated on.

    Checkpoints and validation results are written to `folder`; batches are counted in windows.
    """
    world = engine.world
    windows = Windows.of_file(tokens, "uint16", recipe.training.seq_len, tokens.stat().st_size // 2)
    return LoopParts(
        recipe=recipe,
        engine=engine,
        stream=BatchStream({"tokens": windows}, seed=recipe.seed, batch_windows=recipe.training.batch_windows),
        validator=Validator(
            HeldOut({"tokens": windows}, limit=recipe.validation.max_tokens // recipe.training.seq_len, eos_id=0),
            batch_size=validation_batch,
            rank=world.rank,
            size=world.size,
            packing=packing,
        ),
        saver=Saver(
            CheckpointStore(folder / "checkpoints", keep=1),
            layout=layout,
            world=world,
            reliability=Reliability(),
            fingerprints={},
        ),
        recorder=recorder,
        restore=lambda: None,
        controls=Controls(folder, StopSignal(), world),
        watch=Watchdog(Reliability(watchdog=False), world, folder, on_hang=print),
        world=world,
        eval_dir=folder,
        micro_batch_size=micro_batch,
        utilization=None,
        data_metrics=lambda _state: {},
    )
