"""Loops in plain PyTorch: the one a user would write, and the base of the engine tax."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.subjects.turns import LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY, Order, Turns
from benchmarks.subjects.windows import build_model, held_micro_batches


def run(order: Order, turns: Turns) -> None:
    """Train the plain loop that the order names."""
    turns.packages = ("torch", "transformers")
    step = _autocast(order, turns) if order.subject == "plain" else _master(order, turns)
    while True:
        turns.step_done(step())


def _autocast(order: Order, turns: Turns) -> Callable[[], Callable[[], float]]:
    """fp32 weights under autocast, the model's own loss, AdamW as it comes."""
    model: Any = build_model(order)
    model.to(order.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    batches = held_micro_batches(order, turns)

    def step() -> Callable[[], float]:
        for _ in range(order.accumulation):
            inputs = next(batches)[:, :-1]
            with torch.autocast(order.device, dtype=torch.bfloat16):
                loss = model(input_ids=inputs, labels=inputs).loss
            (loss / order.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return lambda: float(loss)

    return step


def _master(order: Order, turns: Turns) -> Callable[[], Callable[[], float]]:
    """bf16 weights, its own fp32 masters, the project's kernels.

    Gradients add up where autograd puts them, in bf16: the least that such a loop can do. The cost of fp32 sums is
    part of the project's tax.
    """
    from inheritune_ds.distributed.environment import keep_freed_memory
    from inheritune_ds.training.block_wrapping import wrap_blocks
    from inheritune_ds.training.document_masks import skip_packing_check
    from inheritune_ds.training.loss import attach_loss

    compiled = order.subject == "plain_master_compiled"
    model: Any = build_model(order)
    if order.device == "cpu" and order.keep_freed_memory:
        turns.notes = (f"allocator: {keep_freed_memory()}",)
    masters = [parameter.detach().clone().to(order.device) for parameter in model.parameters()]
    model.set_attn_implementation("sdpa")
    skip_packing_check()
    attach_loss(model, "chunked", compiled=compiled)
    wrap_blocks(model, compiled=compiled, activation_checkpointing="none")
    model.to(device=order.device, dtype=torch.bfloat16).train()
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    batches = held_micro_batches(order, turns)
    factor = 1.0 / (order.step_windows * order.seq_len)

    def step() -> Callable[[], float]:
        total = torch.zeros((), device=order.device)
        for _ in range(order.accumulation):
            tokens_BT1 = next(batches)  # noqa: N806 - shape suffix
            loss, loss_sum = model(
                input_ids=tokens_BT1[:, :-1], targets=tokens_BT1[:, 1:], factor=factor, use_cache=False
            )
            loss.backward()
            total += loss_sum
        for master, weight in zip(masters, weights, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters, MAX_GRAD_NORM)
        optimizer.step()
        with torch.no_grad():
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master)
        return lambda: float(total) * factor

    return step
