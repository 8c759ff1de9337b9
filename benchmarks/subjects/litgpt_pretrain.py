"""litgpt's own pretraining, `litgpt.pretrain.setup`, in litgpt's own environment."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from litgpt.args import EvalArgs, TrainArgs  # type: ignore[import-not-found]
from litgpt.config import Config  # type: ignore[import-not-found]
from litgpt.data import DataModule  # type: ignore[import-not-found]
from litgpt.pretrain import setup  # type: ignore[import-not-found]
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.subjects.turns import LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY, Order, Turns
from benchmarks.subjects.windows import Windows

SANITY_BATCHES = 2
"""Batches that litgpt scores before it trains."""


class _Endless(IterableDataset[torch.Tensor]):
    """The windows over and over. One that opens a step ends the step before it: nothing is read ahead."""

    def __init__(self, order: Order, turns: Turns) -> None:
        self._windows = Windows(order, turns)
        self._order, self._turns = order, turns

    def __iter__(self) -> Iterator[torch.Tensor]:
        for served in count():
            if served and served % self._order.step_windows == 0:
                self._turns.step_done()
            yield self._windows[served % len(self._windows)]


class _Data(DataModule):  # type: ignore[misc]  # litgpt is not in this environment
    """What litgpt asks for its loaders."""

    def __init__(self, order: Order, turns: Turns) -> None:
        super().__init__()
        self._order, self._turns = order, turns

    def connect(self, *_: Any, **__: Any) -> None:
        """The order says everything."""

    def train_dataloader(self) -> Any:
        """Windows without end."""
        return DataLoader(_Endless(self._order, self._turns), batch_size=self._order.micro_batch)

    def val_dataloader(self) -> Any:
        """As many batches as litgpt looks at before it starts."""
        shape = (SANITY_BATCHES * self._order.micro_batch, self._order.seq_len + 1)
        return DataLoader(torch.zeros(shape, dtype=torch.int64), batch_size=self._order.micro_batch)  # type: ignore[arg-type]


def config_of(shape: dict[str, Any]) -> Config:
    """The config of a shape; litgpt's GPT-2 has no learned positions and takes rotary ones on a quarter of a head."""
    common = {
        "name": "benchmark",
        "block_size": shape["max_position_embeddings"],
        "vocab_size": shape["vocab_size"],
        "padded_vocab_size": shape["vocab_size"],
        "n_layer": shape["num_hidden_layers"],
        "n_head": shape["num_attention_heads"],
        "n_embd": shape["hidden_size"],
    }
    if shape["model_type"] == "gpt2":
        return Config(**common, rotary_percentage=0.25, parallel_residual=False, lm_head_bias=False)
    return Config(
        **common,
        intermediate_size=shape["intermediate_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )


def run(order: Order, turns: Turns) -> None:
    """Train with `setup` -> `main` -> `fit`, which compile the model."""
    turns.packages = ("torch", "litgpt", "lightning")
    setup(
        model_name="benchmark",
        model_config=config_of(order.shape),
        out_dir=Path(order.folder) / "litgpt",
        precision="bf16-mixed",
        data=_Data(order, turns),
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=order.step_windows,
            micro_batch_size=order.micro_batch,
            max_tokens=order.total_steps * order.step_windows * order.seq_len,
            max_norm=MAX_GRAD_NORM,
            lr_warmup_steps=0,
            tie_embeddings=order.shape["model_type"] == "gpt2",
        ),
        eval=EvalArgs(interval=order.total_steps, max_iters=SANITY_BATCHES, final_validation=False),
        optimizer={
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
        },
        devices=1,
        logger_name="csv",
    )
