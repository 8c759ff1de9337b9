"""Compare the planner's memory with the peak of real steps on the CPU: live tensor bytes of the engine.

`python -m benchmarks.memory` builds engines for every ZeRO stage, precision, accumulation type and kernel on one and
two ranks, counts live tensors during a step of each, and writes docs/results/memory.json. A step of one micro-step is
also counted by torch's MemTracker, which supports no more. The bar is 15 %; the exit code is 1 if it is missed. A CPU
cannot show the margin: the context of the device, and fragmentation.
"""

import sys
from collections.abc import Iterable
from dataclasses import asdict
from itertools import product
from typing import TYPE_CHECKING, Any

from benchmarks.ranks import Case, build_engine, micro_batches, on_ranks
from benchmarks.record import command_line, record
from inheritune_ds.plan.memory import memory
from inheritune_ds.plan.model_size import GIB, parameters

if TYPE_CHECKING:
    import torch

    from inheritune_ds.distributed.world import World
    from inheritune_ds.training.engine import Engine

RANKS = (1, 2)
TOLERANCE = 0.15
WARM_UP_STEPS = 2  # the first allocates the optimizer's moments and records the order of ZeRO-3's parameters


def cases(ranks: int, *, rehearse: bool) -> list[Case]:
    """The engines on one rank or two: all with a small and a large micro-batch."""
    small: dict[str, Any] = {"micro_batch_size": 1}
    large: dict[str, Any] = {"micro_batch_size": 12, "accumulation": 2}
    if rehearse:
        small_model: dict[str, Any] = {"blocks": 2, "hidden_size": 64, "seq_len": 64}
        return [
            Case(1, **small_model),
            Case(2, "fp32", **small_model, **large),
            Case(3, accumulate="bf16", micro_batch_size=8, **small_model),
            Case(1, recomputation="full", **small_model, **large),
        ]
    types: list[dict[str, Any]] = [{"precision": "fp32"}, {}, {"accumulate": "bf16"}]
    found = [Case(stage, **kind, **size) for stage, kind, size in product((1, 2, 3), types, (small, large))]
    if ranks > 1:
        return found
    kernels: list[dict[str, Any]] = [
        {"recomputation": "selective"},
        {"recomputation": "full"},
        {"loss": "plain"},
        {"immediate": True},
    ]
    found += [Case(1, **kernel, micro_batch_size=8) for kernel in kernels]
    found += [Case(1, family="gpt2", **kernel, micro_batch_size=8) for kernel in ({}, *kernels)]
    return found + [Case(stage, family="gpt2", **large) for stage in (2, 3)]


def measure(case: Case, world: "World") -> dict[str, Any]:
    """Train some steps; return the peak bytes of the last, counted and predicted."""
    from benchmarks.live_bytes import LiveBytes, live_tensors, storages

    foreign = storages(live_tensors())  # of earlier engines, which DeepSpeed does not free at once
    engine, layout = build_engine(case, world)
    batches = micro_batches(case, world.rank)
    for _ in range(WARM_UP_STEPS):
        engine.train_step(batches, lr=1e-3)

    def own() -> Iterable["torch.Tensor"]:
        return [tensor for tensor in live_tensors() if id(tensor.untyped_storage()) not in foreign]

    live = LiveBytes(own())
    with live:
        engine.train_step(batches, lr=1e-3)
    tracked = _tracked(engine, batches, own()) if case.accumulation == 1 else None
    engine.close()
    sizes = {"micro_batch_size": case.micro_batch_size, "accumulation": case.accumulation}
    planned = memory(case.shape, case.blocks, **sizes, **layout)
    return {
        "case": case.name,
        "ranks": world.size,
        "parameters": parameters(case.shape).total,
        "live_bytes": live.peak,
        "mem_tracker_bytes": tracked,
        "planned_bytes": planned.tensors_gib * GIB,
        "planned_moment": "backward" if planned.parts is planned.backward else "update",
        "ratio": planned.tensors_gib * GIB / live.peak,
        "settings": asdict(case),
    }


def _tracked(engine: "Engine", batches: "list[torch.Tensor]", own: "Iterable[torch.Tensor]") -> int:
    """The peak of one more step by torch's tracker."""
    import torch
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker = MemTracker()
    tracker.track_external(*own)
    with tracker:
        engine.train_step(batches, lr=1e-3)
    return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    count = row["parameters"]
    tracked = "-" if row["mem_tracker_bytes"] is None else f"{row['mem_tracker_bytes'] / count:.2f}"
    return (
        f"{row['ranks']} x {row['case']:<44}{row['live_bytes'] / count:>9.2f}{tracked:>12}"
        f"{row['planned_bytes'] / count:>9.2f}{row['ratio']:>8.3f}  {row['planned_moment']}"
    )


HEAD = f"{'bytes per parameter':<48}{'counted':>9}{'MemTracker':>12}{'planned':>9}{'ratio':>8}  worst moment"


def measure_all(world: "World", *, rehearse: bool) -> list[dict[str, Any]]:
    """A row per case; all ranks call it."""
    rows = []
    for case in cases(world.size, rehearse=rehearse):
        rows.append(measure(case, world))
        if world.is_main:
            print(f"> {line(rows[-1])}", flush=True)
    return rows


def main() -> None:
    """Measure, compare, write the JSON file."""
    args = command_line("memory", __doc__, rehearse="a few small cases on one rank, for a test").parse_args()
    rows: list[dict[str, Any]] = []
    print(HEAD)
    for ranks in RANKS[:1] if args.rehearse else RANKS:
        rows += on_ranks("benchmarks.memory:measure_all", {"rehearse": args.rehearse}, ranks)
    worst = max(rows, key=lambda row: abs(row["ratio"] - 1.0))
    print(f"largest error of {len(rows)} cases: {abs(worst['ratio'] - 1.0):.1%} ({worst['ranks']} x {worst['case']})")
    record(args, {"tolerance": TOLERANCE, "largest_error": abs(worst["ratio"] - 1.0), "cases": rows})
    sys.exit(1 if abs(worst["ratio"] - 1.0) > TOLERANCE else 0)


if __name__ == "__main__":
    main()
