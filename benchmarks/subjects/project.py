"""This program: its training loop as `inheritune_ds.run` builds it, with its recorder and ds_configs/cpu.json."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.ranks import join_ranks
from benchmarks.subjects.turns import LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY, Order, Turns
from inheritune_ds.config import deepspeed_checks
from inheritune_ds.config.deepspeed import MICRO_BATCH, Machine, Resolved, resolve
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.plan.shapes import target_shape
from tests import tiny

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
SAME_KERNELS = {"attention": "sdpa", "optimizer": "torch_fused", "liger": False, "loss": "chunked"}
"""Those of the plain loop with masters; as shipped, the program chooses."""
NEVER = 10**9
"""Steps between validations and checkpoints: a block holds steps only."""


def recipe_of(order: Order) -> Recipe:
    """The experiment that an order asks for."""
    never = {"interval_steps": NEVER}
    return tiny.recipe(
        target={"shape": order.shape},
        corpus={"sources": [{"kind": "embedded"}], "tokenizer": {"vocab_size": order.shape["vocab_size"]}},
        training={
            "seq_len": order.seq_len,
            "global_batch_tokens": order.step_windows * order.seq_len,
            "duration": f"{order.total_steps} steps",
        },
        optimizer={"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "max_grad_norm": MAX_GRAD_NORM},
        validation={**never, "max_tokens": 2 * order.seq_len},
        checkpoint=never,
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
    kind: Any = order.device
    world, recipe = join_ranks(kind), recipe_of(order)
    resolved = resolve_for(order, recipe)

    import torch

    from benchmarks.program import kernels_of, loop_parts
    from benchmarks.subjects.windows import build_model
    from inheritune_ds.checkpoints.train_state import SavedLayout
    from inheritune_ds.distributed.environment import keep_freed_memory
    from inheritune_ds.tracking.recorder import RunRecorder
    from inheritune_ds.training.engine import Engine, StepResult
    from inheritune_ds.training.loop import train

    model = build_model(order)
    tokens = order.total_steps * recipe.training.global_batch_tokens
    kernels, notes = kernels_of(resolved, model, order.device, tokens)
    if order.device == "cpu" and (order.keep_freed_memory or order.subject == "project_shipped"):
        notes = (*notes, f"allocator: {keep_freed_memory()}")

    class Counted(Engine):
        """The program's own; the windows of every step are counted."""

        def train_step(self, micro_batches: Sequence[torch.Tensor], **options: Any) -> StepResult:
            turns.windows += sum(map(len, micro_batches))
            return super().train_step(micro_batches, **options)

    class PausingRecorder(RunRecorder):
        """The program's own; a turn may end after every step."""

        def update(self, step: int, loss: float, tokens_per_s: float) -> None:
            super().update(step, loss, tokens_per_s)
            turns.step_done(lambda: loss)

    engine = Counted(model, resolved.config, world, kernels)
    turns.notes = (*notes, *engine.notes)
    folder = Path(order.folder) / "run"
    folder.mkdir(parents=True)
    parts = loop_parts(
        recipe,
        engine,
        PausingRecorder(folder, recipe, order.total_steps, None, on_saved=lambda _: None),
        tokens=Path(order.tokens),
        folder=folder,
        layout=SavedLayout(world.size, resolved.zero_stage, resolved.precision),
        micro_batch=resolved.micro_batch_size,
    )
    train(parts, order.total_steps, None)
