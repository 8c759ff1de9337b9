"""Several ranks on this machine that run one benchmark module together, and the small engines that they build."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.launch import POLL_S, kill
from benchmarks.record import REPOSITORY
from inheritune_ds.config.model import Shape
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.config.zero import Loss, Precision, Recomputation, ZeroSettings, read_layout
from tests.launching import environment, free_port, torchrun_variables

if TYPE_CHECKING:
    import torch

    from inheritune_ds.distributed.world import World
    from inheritune_ds.training.engine import Engine


@dataclass(frozen=True)
class Case:
    """One engine to be measured; sizes are those of a rank."""

    stage: int = 1
    precision: Precision = "bf16"
    accumulate: Literal["fp32", "bf16"] = "fp32"
    micro_batch_size: int = 2
    accumulation: int = 1
    loss: Loss = "chunked"
    recomputation: Recomputation = "none"
    immediate: bool = False
    family: Literal["llama", "gpt2"] = "llama"
    hidden_size: int = 128
    blocks: int = 4
    vocab_size: int = 1024
    seq_len: int = 128

    @property
    def shape(self) -> Shape:
        """The model."""
        return Shape(
            model_type=self.family,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.blocks,
            num_attention_heads=4,
            max_position_embeddings=self.seq_len,
            intermediate_size=self.hidden_size * 43 // 16 if self.family == "llama" else None,
            tie_word_embeddings=self.family == "gpt2",
        )

    @property
    def name(self) -> str:
        """The case in a few words."""
        words = [self.family, f"ZeRO-{self.stage}", f"{self.precision}/{self.accumulate}"]
        words.append(f"{self.micro_batch_size} x {self.accumulation}")
        words += [self.loss] * (self.loss != "chunked") + [self.recomputation] * (self.recomputation != "none")
        return " ".join(words + ["immediate"] * self.immediate)


def build_engine(
    case: Case,
    world: "World",
    target: Path | None = None,
    loading: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> "tuple[Engine, ZeroSettings]":
    """The project's engine for a case, and how its config lays the model out.

    Args:
        case: What to build.
        world: This rank among all.
        target: Folder of the model; None: one with random weights.
        loading: Around the load of the target, before the engine takes it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from inheritune_ds.config.deepspeed import Machine, resolve
    from inheritune_ds.surgery.load import build_config
    from inheritune_ds.training.engine import Engine
    from inheritune_ds.training.kernels import Kernels
    from inheritune_ds.training.load import load_target

    recipe = _recipe(case, world.size)
    document = {
        "train_micro_batch_size_per_gpu": case.micro_batch_size,
        "bf16": {"enabled": case.precision == "bf16", "immediate_grad_update": case.immediate},
        "data_types": {"grad_accum_dtype": case.accumulate},
        "zero_optimization": {
            "stage": case.stage,
            "overlap_comm": False,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
        "kernels": {"loss": case.loss, "activation_checkpointing": case.recomputation, "compile": False},
    }
    machine = Machine("cpu", 64.0, bf16=True)
    resolved = resolve(
        document, recipe, origin="case", shape=(case.shape, case.blocks), world_size=world.size, machine=machine
    )
    torch.manual_seed(0)
    config = build_config(case.shape)
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    kernels = Kernels("sdpa", "torch_fused", False, case.loss, False, case.recomputation)
    with loading():
        model = AutoModelForCausalLM.from_config(config) if target is None else load_target(target, resolved.config)
    engine = Engine(model, resolved.config, world, kernels, target=target)
    return engine, read_layout(resolved.config, seq_len=case.seq_len, world_size=world.size)


def _recipe(case: Case, ranks: int) -> Recipe:
    never: dict[str, Any] = {"interval_steps": 10**9}
    return Recipe.model_validate(
        {
            "name": "case",
            "description": "an engine to be measured",
            "target": {"shape": case.shape.model_dump()},
            "corpus": {"sources": [{"kind": "embedded"}], "tokenizer": {"vocab_size": case.vocab_size}},
            "training": {
                "seq_len": case.seq_len,
                "global_batch_tokens": case.micro_batch_size * case.accumulation * ranks * case.seq_len,
                "duration": "100 steps",
            },
            "optimizer": {"lr": 1e-3},
            "schedule": {"kind": "constant"},
            "validation": never,
            "checkpoint": never,
        }
    )


def micro_batches(case: Case, rank: int = 0) -> "list[torch.Tensor]":
    """Random tokens of one step of one rank."""
    import torch

    generator = torch.Generator().manual_seed(rank)
    size = (case.micro_batch_size, case.seq_len + 1)
    return [torch.randint(0, case.vocab_size, size, generator=generator) for _ in range(case.accumulation)]


def join_ranks() -> "World":
    """Become the rank that the environment says, in a process group with the others."""
    from inheritune_ds.distributed.environment import prepare_environment
    from inheritune_ds.distributed.world import detect, export

    world = detect(os.environ)
    export(world, os.environ)
    prepare_environment(os.environ, kind="cpu")
    from inheritune_ds.distributed.process_group import start_process_group

    start_process_group(world)
    return world


def run_ranks(module: str, arguments: Sequence[str], ranks: int, *, threads: int = 1, timeout_s: float = 600.0) -> None:
    """Run `python -m module arguments` once a rank on the CPU; a failing rank ends all, and this program.

    Lines of rank 0 that start with `>` are shown at once. `threads` are those of each rank.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(ranks)]
        processes = [_start(module, arguments, rank, ranks, port, threads, logs[rank]) for rank in range(ranks)]
        shown, deadline = 0, time.monotonic() + timeout_s
        try:
            while any(process.poll() is None for process in processes):
                shown = _show(logs[0], shown)
                if time.monotonic() > deadline or any(process.poll() for process in processes):
                    break
                time.sleep(POLL_S)
            _show(logs[0], shown)
            bad = [rank for rank, process in enumerate(processes) if process.poll() != 0]
            if bad:
                sys.exit(f"rank {bad[0]} failed; its log's end:\n{logs[bad[0]].read_text(encoding='utf-8')[-3000:]}")
        finally:
            for process in processes:
                kill(process)


def _start(  # noqa: PLR0913, PLR0917 - parts of the environment of a rank
    module: str, arguments: Sequence[str], rank: int, ranks: int, port: str, threads: int, log: Path
) -> "subprocess.Popen[bytes]":
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-u", "-m", module, *arguments],
            cwd=REPOSITORY,
            env=environment(OMP_NUM_THREADS=str(threads), **torchrun_variables(rank, ranks, port)),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _show(log: Path, seen: int) -> int:
    """Print the new lines of a log that begin with `>`; returns the position after them."""
    text = log.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    for line in whole[seen:].splitlines():
        if line.startswith("> "):
            print(line[2:], flush=True)
    return len(whole)
