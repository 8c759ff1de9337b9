"""Input of the subjects: windows of one file of random tokens, and Hugging Face models of one shape."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.subjects.turns import Order, Turns

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEED = 1337
HELD_MICRO_BATCHES = 32
"""The plain loops repeat this many from memory: reading costs them nothing."""


class Windows(torch.utils.data.Dataset[torch.Tensor]):
    """Windows (T + 1,) of the token file, counted as they are read."""

    def __init__(self, order: Order, turns: Turns) -> None:
        self._tokens = np.memmap(order.tokens, dtype="<u2", mode="r")
        self._seq_len, self._turns = order.seq_len, turns

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._seq_len

    def __getitem__(self, number: int) -> torch.Tensor:
        self._turns.windows += 1
        start = number * self._seq_len
        return torch.from_numpy(self._tokens[start : start + self._seq_len + 1].astype(np.int64))


def held_micro_batches(order: Order, turns: Turns) -> Iterator[torch.Tensor]:
    """Micro-batches (B, T + 1) on the device, the same few over and over."""
    windows = Windows(order, turns)
    count = min(HELD_MICRO_BATCHES, len(windows) // order.micro_batch)
    rows = torch.stack([windows[number] for number in range(count * order.micro_batch)])
    held = rows.view(count, order.micro_batch, -1).to(order.device)
    while True:
        for tokens_BT1 in held:  # noqa: N806 - shape suffix
            turns.windows += order.micro_batch
            yield tokens_BT1


def build_model(order: Order) -> "PreTrainedModel":
    """The shape with random values, in fp32."""
    from benchmarks.ranks import random_model
    from inheritune_ds.config.model import Shape

    return random_model(Shape.model_validate(order.shape), SEED)
