"""Bare DeepSpeed ZeRO-1, and Hugging Face's Trainer with it."""

import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.subjects.turns import LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY, Order, Turns
from benchmarks.subjects.windows import SEED, Windows, build_model, held_micro_batches


def run(order: Order, turns: Turns) -> None:
    """Train with the framework that the order names."""
    from inheritune_ds.distributed.world import detect, export

    turns.packages = ("torch", "transformers", "accelerate", "deepspeed")
    export(detect(os.environ), os.environ)  # a meeting point, where no launcher gave one
    (_hf_trainer if order.subject == "hf_trainer" else _deepspeed)(order, turns)


def _deepspeed(order: Order, turns: Turns) -> None:
    import deepspeed

    deepspeed.init_distributed(verbose=False)
    model = build_model(order)
    config: dict[str, Any] = {
        "train_batch_size": order.step_windows,
        "train_micro_batch_size_per_gpu": order.micro_batch,
        "gradient_accumulation_steps": order.accumulation,
        "gradient_clipping": MAX_GRAD_NORM,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "steps_per_print": 2**31 - 1,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    batches = held_micro_batches(order, turns)
    while True:
        for _ in range(order.accumulation):
            inputs = next(batches)[:, :-1]
            loss = engine(input_ids=inputs, labels=inputs, use_cache=False).loss
            engine.backward(loss)
            engine.step()
        turns.step_done(loss.detach().item)


def _hf_trainer(order: Order, turns: Turns) -> None:
    """`Trainer.train()` itself, with the fused AdamW; its DeepSpeed config leaves everything to it that it may."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Pause(TrainerCallback):
        """Waits after every optimizer step."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.step_done()

    class Samples(Windows):
        """Windows as the Trainer's collator takes them, over and over in one epoch; the model shifts the labels."""

        def __len__(self) -> int:
            return order.total_steps * order.step_windows

        def __getitem__(self, number: int) -> Any:
            inputs = super().__getitem__(number % super().__len__())[:-1]
            return {"input_ids": inputs, "labels": inputs}

    arguments = TrainingArguments(
        output_dir=str(Path(order.folder) / "hf_trainer"),
        per_device_train_batch_size=order.micro_batch,
        gradient_accumulation_steps=order.accumulation,
        max_steps=order.total_steps,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        bf16=True,
        use_cpu=order.device == "cpu",
        seed=SEED,
        dataloader_drop_last=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        deepspeed={
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "zero_optimization": {"stage": 1},
        },
    )
    samples = Samples(order, turns)
    Trainer(model=build_model(order), args=arguments, train_dataset=samples, callbacks=[Pause()]).train()
