"""Several ranks on this machine that run one benchmark module together, and the small engines that they build."""

import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.launch import POLL_S, kill, start
from benchmarks.record import REPOSITORY
from inheritune_ds.checkpoints.store import CheckpointStore
from inheritune_ds.config.kernels import KernelRequest
from inheritune_ds.config.model import Shape
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.config.zero import Loss, Precision, Recomputation, ZeroSettings, read_layout
from inheritune_ds.storage.files import read_json, write_json
from tests import tiny
from tests.launching import environment, free_port, torchrun_variables

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from inheritune_ds.checkpoints.saver import Saver
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
    from inheritune_ds.training.engine import Engine
    from inheritune_ds.training.kernels import Kernels
    from inheritune_ds.training.load import load_target

    resolved = tiny.resolve(
        _recipe(case, world.size),
        world,
        stage=case.stage,
        micro_batch=case.micro_batch_size,
        bf16={"enabled": case.precision == "bf16", "immediate_grad_update": case.immediate},
        data_types={"grad_accum_dtype": case.accumulate},
        zero_optimization={
            "overlap_comm": False,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
        kernels={"loss": case.loss, "activation_checkpointing": case.recomputation, "compile": False},
    )
    kernels = Kernels("sdpa", "torch_fused", False, case.loss, False, case.recomputation)
    with loading():
        model = random_model(case.shape) if target is None else load_target(target, resolved.config)
    engine = Engine(model, resolved.config, world, kernels, target=target)
    return engine, read_layout(resolved.config, seq_len=case.seq_len, world_size=world.size)


def random_model(shape: Shape, seed: int = 0) -> "PreTrainedModel":
    """A model with random values in fp32, without dropout."""
    import torch
    from transformers import AutoModelForCausalLM

    from inheritune_ds.surgery.load import build_config

    config: Any = build_config(shape)
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def fit(model: "PreTrainedModel", request: KernelRequest, device: "torch.device", dtype: "torch.dtype") -> bool:
    """Move a model to a device and give it the kernels and the type, as the engine does; whether it took all kernels.

    Raises:
        InherituneError: If a kernel cannot be used here.
    """
    from torch import nn

    from inheritune_ds.training import engine
    from inheritune_ds.training.kernels import choose_kernels

    nn.Module.to(model, device)
    kernels, _ = choose_kernels(
        request, config=model.config, device=device, dtype=dtype, zero_stage=1, offload=False, run_flops=None
    )
    taken, _ = engine._fit(model, kernels)  # noqa: SLF001 - the engine's change of a model is measured
    nn.Module.to(model, dtype)
    return taken == kernels


def build_saver(
    world: "World", store: CheckpointStore, *, stage: int = 1, precision: Precision = "bf16", **policy: Any
) -> "Saver":
    """A saver of checkpoints of an engine; `policy` are keys of a Reliability."""
    from inheritune_ds.checkpoints.saver import Saver
    from inheritune_ds.checkpoints.train_state import SavedLayout
    from inheritune_ds.config.reliability import Reliability

    return Saver(
        store,
        layout=SavedLayout(world.size, stage, precision),
        world=world,
        reliability=Reliability(**policy),
        fingerprints={},
    )


def _recipe(case: Case, ranks: int) -> Recipe:
    step_tokens = case.micro_batch_size * case.accumulation * ranks * case.seq_len
    return tiny.recipe(
        target={"shape": case.shape.model_dump()},
        corpus={"sources": [{"kind": "embedded"}], "tokenizer": {"vocab_size": case.vocab_size}},
        training={"seq_len": case.seq_len, "global_batch_tokens": step_tokens, "duration": "100 steps"},
    )


def micro_batches(case: Case, rank: int = 0) -> "list[torch.Tensor]":
    """Random tokens of one step of one rank."""
    import torch

    generator = torch.Generator().manual_seed(rank)
    size = (case.micro_batch_size, case.seq_len + 1)
    return [torch.randint(0, case.vocab_size, size, generator=generator) for _ in range(case.accumulation)]


def join_ranks(kind: Literal["cuda", "cpu"] = "cpu") -> "World":
    """Become the rank that the environment says, in a process group with the others, on a kind of device."""
    from inheritune_ds.distributed.environment import prepare_environment
    from inheritune_ds.distributed.world import detect, export

    world = detect(os.environ)
    export(world, os.environ)
    prepare_environment(os.environ, kind=kind)
    from inheritune_ds.distributed.process_group import start_process_group

    start_process_group(world)
    return world


def gathered(world: "World", value: Any) -> list[Any]:
    """A value of every rank."""
    import torch.distributed as dist

    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def drive(function: Callable[..., Any], arguments: str, out: str) -> None:
    """Call `function(world, **arguments)` as one rank of several; rank 0 writes the result.

    Args:
        function: Of this rank's World and the arguments.
        arguments: A JSON object.
        out: JSON file.
    """
    world = join_ranks()
    result = function(world, **json.loads(arguments))
    if world.is_main:
        write_json(Path(out), result)
    from inheritune_ds.distributed.process_group import end_rank

    end_rank()


def on_ranks(function: str, arguments: Mapping[str, Any], ranks: int, *, timeout_s: float = 600.0) -> Any:
    """Call `MODULE:FUNCTION` on ranks of this CPU, one thread each, as `drive` does; returns the result of rank 0.

    A failing rank ends all, and this program. Lines of rank 0 that start with `>` are shown at once.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        out, logs = Path(folder) / "result.json", [Path(folder) / f"rank{rank}.log" for rank in range(ranks)]
        command = [sys.executable, "-u", "-m", "benchmarks.ranks", function, json.dumps(arguments), str(out)]
        environments = [environment(**torchrun_variables(rank, ranks, port)) for rank in range(ranks)]
        processes = [start(command, log, cwd=REPOSITORY, env=env) for log, env in zip(logs, environments, strict=True)]
        shown, deadline = 0, time.monotonic() + timeout_s
        try:
            while any(process.poll() is None for process in processes):
                shown = _show(logs[0], shown)
                if time.monotonic() > deadline or any(process.poll() for process in processes):
                    break
                time.sleep(POLL_S)
            _show(logs[0], shown)
            codes = [process.poll() for process in processes]
            if any(codes) or None in codes:
                raise SystemExit(
                    "\n".join(
                        _end_of(rank, code, log) for rank, (code, log) in enumerate(zip(codes, logs, strict=True))
                    )
                )
        finally:
            for process in processes:
                kill(process)
        return read_json(out)


def _end_of(rank: int, code: int | None, log: Path) -> str:
    """What is known of a rank when one of them failed or all took too long."""
    state = "was still running" if code is None else f"ended with {code}"
    return f"rank {rank} {state}; its log's end:\n{log.read_text(encoding='utf-8', errors='replace')[-3000:]}"


def _show(log: Path, seen: int) -> int:
    """Print the new lines of a log that begin with `>`; returns the position after them."""
    text = log.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    for line in whole[seen:].splitlines():
        if line.startswith("> "):
            print(line[2:], flush=True)
    return len(whole)


def main() -> None:
    """One rank of `on_ranks`."""
    module, _, name = sys.argv[1].partition(":")
    drive(getattr(importlib.import_module(module), name), *sys.argv[2:])


if __name__ == "__main__":
    main()
