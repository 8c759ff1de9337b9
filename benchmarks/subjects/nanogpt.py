"""nanoGPT's model.py from a checkout, with the loop and the loader of its train.py."""

import sys
from typing import Any

import numpy as np
import torch

from benchmarks.subjects.turns import LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY, Order, Turns
from benchmarks.subjects.windows import SEED

BETAS = (0.9, 0.95)
"""train.py's own."""


def get_batch(path: str, batch_size: int, block_size: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (B, T) at random offsets, as train.py reads them: the file is mapped again each time."""
    data = np.memmap(path, dtype=np.uint16, mode="r")
    offsets = torch.randint(len(data) - block_size, (batch_size,))
    x = torch.stack([torch.from_numpy(data[i : i + block_size].astype(np.int64)) for i in offsets])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + block_size].astype(np.int64)) for i in offsets])
    if device == "cuda":
        return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
    return x, y


def run(order: Order, turns: Turns) -> None:
    """Train as train.py does; it knows no bf16 on a CPU, and is given it here."""
    assert order.nanogpt is not None  # the harness has looked
    turns.packages = ("torch",)
    sys.path.insert(0, order.nanogpt)
    module: Any = __import__("model")
    shape = order.shape
    torch.manual_seed(SEED)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    model: Any = module.GPT(
        module.GPTConfig(
            block_size=order.seq_len,
            vocab_size=shape["vocab_size"],
            n_layer=shape["num_hidden_layers"],
            n_head=shape["num_attention_heads"],
            n_embd=shape["hidden_size"],
            dropout=0.0,
            bias=True,
        )
    ).to(order.device)
    optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, BETAS, order.device)
    model = torch.compile(model)
    read = (order.tokens, order.micro_batch, order.seq_len, order.device)
    x, y = get_batch(*read)
    while True:
        for _ in range(order.accumulation):
            with torch.autocast(order.device, dtype=torch.bfloat16):
                _, loss = model(x, y)
                scaled = loss / order.accumulation
            x, y = get_batch(*read)  # train.py reads the next batch while the GPU computes
            turns.windows += order.micro_batch
            scaled.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turns.step_done(loss.item)
