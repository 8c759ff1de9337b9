"""This program: its training loop as `inheritune_ds.run` builds it, with its recorder and ds_configs/cpu.json."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.subjects.turns import LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY, Order, Turns
from inheritune_ds.config import deepspeed_checks
from inheritune_ds.config.deepspeed import MICRO_BATCH, Machine, Resolved, resolve
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.distributed.environment import prepare_environment
from inheritune_ds.distributed.signals import StopSignal
from inheritune_ds.distributed.world import detect, export
from inheritune_ds.plan.shapes import target_shape

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
SAME_KERNELS = {"attention": "sdpa", "optimizer": "torch_fused", "liger": False, "loss": "chunked"}
"""Those of the plain loop with masters; as shipped, the program chooses."""
NEVER = 10**9
"""Steps between validations and checkpoints: a block holds steps only."""


def recipe_of(order: Order) -> Recipe:
    """The experiment that an order asks for."""
    never = {"interval_steps": NEVER}
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "description": "a subject of a side-by-side measurement",
            "target": {"shape": order.shape},
            "corpus": {"sources": [{"kind": "embedded"}], "tokenizer": {"vocab_size": order.shape["vocab_size"]}},
            "training": {
                "seq_len": order.seq_len,
                "global_batch_tokens": order.step_windows * order.seq_len,
                "duration": f"{order.total_steps} steps",
            },
            "optimizer": {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "max_grad_norm": MAX_GRAD_NORM},
            "schedule": {"kind": "constant"},
            "validation": {**never, "max_tokens": 2 * order.seq_len},
            "checkpoint": never,
        }
    )


def resolve_for(order: Order, recipe: Recipe) -> Resolved:
    """The shipped DeepSpeed config with the order's micro-batch, bf16, and the order's kernels."""
    from inheritune_ds.plan.machine import host_memory_gib

    name = "cpu.json" if order.device == "cpu" else "zero1.json"
    document = deepspeed_checks.read(DS_CONFIGS / name)
    document |= {MICRO_BATCH: order.micro_batch, "bf16": {"enabled": True}}
    if order.subject != "project_shipped":
        document["kernels"] = SAME_KERNELS | {"compile": order.subject == "project_compiled"}
    kind: Any = order.device
    machine = Machine(kind, host_memory_gib(), bf16=True)  # its memory decides about a micro-batch of auto alone
    return resolve(document, recipe, origin=name, shape=target_shape(recipe), world_size=1, machine=machine)


def run(order: Order, turns: Turns) -> None:
    """Train with this program's own loop."""
    turns.packages = ("torch", "transformers", "deepspeed")
    world = detect(os.environ)
    export(world, os.environ)
    prepare_environment(os.environ, kind="cpu" if order.device == "cpu" else "cuda")
    recipe = recipe_of(order)
    resolved = resolve_for(order, recipe)

    import torch

    from benchmarks.subjects.windows import build_model
    from inheritune_ds.distributed.environment import keep_freed_memory
    from inheritune_ds.distributed.process_group import start_process_group
    from inheritune_ds.training.engine import Engine, StepResult
    from inheritune_ds.training.kernels import choose_kernels
    from inheritune_ds.training.loop import train

    start_process_group(world)
    model = build_model(order)
    tokens = order.total_steps * recipe.training.global_batch_tokens
    kernels, notes = choose_kernels(
        resolved.kernels,
        config=model.config,
        device=torch.device(order.device),
        dtype=torch.bfloat16,
        zero_stage=resolved.zero_stage,
        offload=resolved.offloads_optimizer,
        run_flops=6.0 * model.num_parameters() * tokens,
    )
    if order.device == "cpu" and (order.keep_freed_memory or order.subject == "project_shipped"):
        notes = (*notes, f"allocator: {keep_freed_memory()}")

    class Counted(Engine):
        """The program's own; the windows of every step are counted."""

        def train_step(self, micro_batches: Sequence[torch.Tensor], **told: Any) -> StepResult:
            turns.windows += sum(map(len, micro_batches))
            return super().train_step(micro_batches, **told)

    engine = Counted(model, resolved.config, world, kernels)
    turns.notes = (*notes, *engine.notes)
    train(_parts(order, turns, recipe, resolved, engine), order.total_steps, None)


def _parts(order: Order, turns: Turns, recipe: Recipe, resolved: Resolved, engine: Any) -> Any:
    """What the loop works with, on windows of the token file, pausing after every step."""
    from inheritune_ds.checkpoints.saver import Saver
    from inheritune_ds.checkpoints.store import CheckpointStore
    from inheritune_ds.checkpoints.train_state import SavedLayout
    from inheritune_ds.config.reliability import Reliability
    from inheritune_ds.data.stream.batches import BatchStream
    from inheritune_ds.data.stream.validation_windows import HeldOut
    from inheritune_ds.data.stream.windows import Windows
    from inheritune_ds.distributed.watchdog import Watchdog
    from inheritune_ds.run.folder import RunFolder
    from inheritune_ds.tracking.recorder import RunRecorder
    from inheritune_ds.training.loop import LoopParts
    from inheritune_ds.training.requests import Controls
    from inheritune_ds.training.validation import Validator

    class PausingRecorder(RunRecorder):
        """The program's own, which the loop tells of every step."""

        def update(self, step: int, loss: float, tokens_per_s: float) -> None:
            super().update(step, loss, tokens_per_s)
            turns.step_done(lambda: loss)

    world = engine.world
    folder = RunFolder(Path(order.folder) / "run")
    folder.eval.mkdir(parents=True)
    file = Path(order.tokens)
    windows = Windows.of_file(file, "uint16", order.seq_len, file.stat().st_size // 2)
    stream = BatchStream({"tokens": windows}, seed=recipe.seed, batch_windows=recipe.training.batch_windows)
    return LoopParts(
        recipe=recipe,
        engine=engine,
        stream=stream,
        validator=Validator(
            HeldOut({"tokens": windows}), max_tokens=recipe.validation.max_tokens, batch_size=2, rank=0, size=1
        ),
        saver=Saver(
            CheckpointStore(folder.checkpoints, keep=1),
            layout=SavedLayout(world.size, resolved.zero_stage, resolved.precision),
            world=world,
            reliability=Reliability(),
            fingerprints={},
            say=print,
        ),
        recorder=PausingRecorder(folder.path, recipe, order.total_steps, None, on_saved=lambda _: None),
        restore=lambda: None,
        controls=Controls(folder.path, StopSignal(), world),
        watch=Watchdog(Reliability(watchdog=False), world, folder.path, on_hang=print),
        world=world,
        eval_dir=folder.eval,
        micro_batch_size=resolved.micro_batch_size,
        utilisation=None,
        data_metrics=lambda _state: {},
    )
