"""The error of a step's gradient compared with fp64, by type of the accumulator, accumulation and ZeRO stage.

`python -m benchmarks.accumulation` writes docs/results/accumulation.json. A small LLaMA in bf16 trains one step of 1,
4, 16 or 64 micro-batches with this program's engine and `data_types.grad_accum_dtype` fp32 or bf16. The gradient is the
optimizer's: its first moment after the first step, over 1 - beta1, without clipping. The reference is the mean gradient
of the same micro-batches in fp64, at the same bf16-rounded weights. An error is the norm of the difference over the
norm of the reference; every seed has its own weights and tokens. One micro-batch has only the rounding of a bf16 pass;
a bf16 accumulator adds rounding, and so does a sum in bf16 for communication, which DeepSpeed also uses on one rank.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.comparison import RESAMPLES, SEED
from benchmarks.ranks import join_ranks
from benchmarks.record import command_line, record
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.distributed.world import World
from tests import tiny

if TYPE_CHECKING:
    import torch

SHAPE: dict[str, Any] = {"model_type": "llama", "vocab_size": 512, "max_position_embeddings": 128}
SHAPE |= {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
SEQ_LEN, MICRO_BATCH_SIZE = 128, 2
BETA_1 = 0.5  # dividing by 1 - beta1 adds no rounding
SUMS = (("fp32", "bf16"), ("bf16", "bf16"))
"""Types of the accumulator and of its communication (DeepSpeed's default)."""
Gradients = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class Case:
    """One way to accumulate a step's gradient."""

    stage: int
    dtype: str
    communication: str
    accumulation: int


def recipe_of(accumulation: int, seed: int) -> Recipe:
    """A step of `accumulation` micro-batches without clipping, of the weights of a seed."""
    step_tokens = accumulation * MICRO_BATCH_SIZE * SEQ_LEN
    return tiny.recipe(
        seed=seed,
        target={"shape": SHAPE},
        corpus={"sources": [{"kind": "embedded"}], "tokenizer": {"vocab_size": SHAPE["vocab_size"]}},
        training={"seq_len": SEQ_LEN, "global_batch_tokens": step_tokens, "duration": "1 steps"},
        optimizer={"lr": 1e-3, "betas": [BETA_1, 0.95], "max_grad_norm": 0.0},
    )


def tokens_of(seed: int, count: int) -> "torch.Tensor":
    """Micro-batches (count, B, T + 1); a larger count only appends some."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    size = (count, MICRO_BATCH_SIZE, SEQ_LEN + 1)
    return torch.randint(SHAPE["vocab_size"], size, generator=generator)


def exact(seed: int, accumulations: Sequence[int], device: str) -> dict[int, Gradients]:
    """Mean gradients of the first micro-batches in fp64, at the weights as bf16 rounds them."""
    import torch
    from torch.nn import functional

    model = tiny.model(recipe_of(1, seed))
    torch.nn.Module.to(model, device, torch.bfloat16).double()
    found = {}
    for number, batch in enumerate(tokens_of(seed, max(accumulations)).to(device), 1):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        torch.autograd.backward(functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()))
        if number in accumulations:
            found[number] = {n: p.grad / number for n, p in model.named_parameters() if p.grad is not None}
    return found


def accumulated(case: Case, seed: int, world: World, device: str) -> Gradients:
    """The gradient for the optimizer, in fp32."""
    from deepspeed.utils import safe_get_full_optimizer_state

    engine = tiny.engine(
        recipe_of(case.accumulation, seed),
        world,
        stage=case.stage,
        precision="bf16",
        micro_batch=MICRO_BATCH_SIZE,
        device=device,
        data_types={"grad_accum_dtype": case.dtype},
        communication_data_type=case.communication,
        kernels={"attention": "sdpa", "optimizer": "torch_fused", "liger": False, "compile": False},
    )
    engine.train_step(list(tokens_of(seed, case.accumulation)), lr=0.0)
    _link_moments(engine)
    found = {
        name: safe_get_full_optimizer_state(parameter, "exp_avg").double() / (1.0 - BETA_1)
        for name, parameter in engine.module.named_parameters()
    }
    engine.close()
    return found


def _link_moments(engine: Any) -> None:
    """Link parameters to their moments: DeepSpeed 0.19 does it after the first group's step, when others have none."""
    optimizer = engine._engine.optimizer  # noqa: SLF001 - there is no public way
    if getattr(optimizer, "_hp_optimizer_states_linked", False):
        optimizer._hp_optimizer_states_linked = False  # noqa: SLF001
        optimizer._lazy_init_hp_params_optimizer_state()  # noqa: SLF001


def error(found: Gradients, wanted: Gradients) -> float:
    """Norm of the difference over the norm of the reference, all tensors together."""
    assert found.keys() == wanted.keys()
    off = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted)
    return float((off / sum(float(gradient.square().sum()) for gradient in wanted.values())) ** 0.5)


def mean_and_interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean, and the 95 % interval of the mean under resampling of the seeds."""
    generator = np.random.default_rng(SEED)
    drawn = generator.choice(np.asarray(values), (RESAMPLES, len(values))).mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"mean": float(np.mean(values)), "interval_95": [float(low), float(high)], "values": list(values)}


def measure(args: argparse.Namespace, world: World) -> list[dict[str, Any]]:
    """A row per stage, type and accumulation."""
    ways = [(stage, *types) for stage, types in itertools.product(args.stages, SUMS)]
    ways += [(1, "fp32", "fp32")] if 1 in args.stages else []
    cases = [Case(stage, dtype, sent, count) for stage, dtype, sent in ways for count in args.accumulations]
    errors: dict[Case, list[float]] = {case: [] for case in cases}
    for seed in range(args.seeds):
        references = exact(seed, args.accumulations, args.device)
        for case in cases:
            errors[case].append(error(accumulated(case, seed, world, args.device), references[case.accumulation]))
    return [{**asdict(case), **mean_and_interval(found)} for case, found in errors.items()]


def lines_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The figures as a Markdown table: a row per stage and type, a column per accumulation, in percent."""
    counts = sorted({row["accumulation"] for row in rows})
    head = ["ZeRO", "grad_accum_dtype", "communicated in", *(f"{count} micro-batches" for count in counts)]
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|" + "---|" * len(counts)]
    cells: dict[tuple[Any, ...], dict[int, str]] = {}
    for row in rows:
        low, high = row["interval_95"]
        text = f"{row['mean']:.3%} ({low:.3%} to {high:.3%})"
        cells.setdefault((row["stage"], row["dtype"], row["communication"]), {})[row["accumulation"]] = text
    for key, cell in cells.items():
        lines.append("| " + " | ".join([*map(str, key), *(cell[count] for count in counts)]) + " |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit code."""
    text = "one seed, two accumulations, stage 1: tests this script"
    parser = command_line("accumulation", __doc__, rehearse=text)
    add = parser.add_argument
    add("--seeds", type=int, default=6, help="weights and tokens to measure with (default: 6)")
    add("--stages", type=int, nargs="+", default=[1, 2, 3], choices=[1, 2, 3], help="ZeRO stages (default: all)")
    add("--accumulations", type=int, nargs="+", default=[1, 4, 16, 64], help="micro-batches a step")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where to compute (default: cpu)")
    args = parser.parse_args(arguments)
    if args.rehearse:
        args.seeds, args.stages, args.accumulations = 1, [1], [1, 4]
    world = join_ranks(args.device)
    from inheritune_ds.distributed.process_group import leave_process_group

    rows = measure(args, world)
    leave_process_group()
    print(*lines_of(rows), sep="\n", flush=True)
    record(args, {"rehearsal": args.rehearse, "shape": SHAPE, "seq_len": SEQ_LEN, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
