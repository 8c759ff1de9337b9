"""Compare the planner's step time with measured steps on the CPU, for 1, 2 and 4 ranks.

`python -m benchmarks.predict` first calibrates without DeepSpeed and without this program's engine: the rate of the
plain model's forward and backward passes (of a whole step, until the slowest rank is done) on one rank alone and on one
rank per core at once, seconds of fused AdamW per parameter, and gloo's latency and bandwidth from all-reduces of two
sizes. From these, FLOPs and the planner's transfers it predicts a step of the same batch on 1, 2 and 4 ranks, measures
it, and writes docs/results/predict.json. Every rank has one thread. Ranks beyond the cores share them: the rates of
passes, update and gloo are then those of a full machine times cores / ranks. Every figure is the fastest of its
repeats, the one with the least disturbance; the file includes the load before and after. The bar is 15 %; the exit code
is 1 if it is missed.
"""

import os
import sys
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.ranks import Case, build_engine, micro_batches, on_ranks, random_model
from benchmarks.record import command_line, record
from inheritune_ds.config.zero import ZeroSettings
from inheritune_ds.distributed.world import World
from inheritune_ds.plan.communication import Link, Transfer, transfers
from inheritune_ds.plan.model_size import flops_per_token, parameters, tensors

RANKS = (1, 2, 4)
TOLERANCE = 0.15
SMALL_BYTES, LARGE_BYTES = 4 * 2**10, 8 * 2**20


@dataclass(frozen=True)
class Size:
    """The model, `windows` per step over all ranks, and `repeats` of every measurement."""

    windows: int
    repeats: int
    hidden_size: int
    blocks: int

    def case(self, ranks: int) -> Case:
        """The engine of a rank: the same batch for every number of ranks."""
        micro_batch = min(4, self.windows // ranks)
        return Case(
            precision="fp32",
            micro_batch_size=micro_batch,
            accumulation=self.windows // ranks // micro_batch,
            hidden_size=self.hidden_size,
            blocks=self.blocks,
        )


FULL, REHEARSAL = Size(32, 10, 256, 4), Size(8, 3, 64, 2)


def fastest_s(action: Callable[[], object], repeats: int) -> float:
    """Least seconds of an action, after an uncounted one."""
    action()
    return min(timeit.repeat(action, number=1, repeat=repeats))


def calibrate(size: Size, world: World) -> dict[str, float]:
    """Rates of this rank, measured on all ranks at once."""
    import torch
    import torch.distributed as dist

    from inheritune_ds.training.loss import attach_loss

    case = size.case(world.size)
    model = random_model(case.shape)
    model.set_attn_implementation("sdpa")
    attach_loss(model, "chunked", compiled=False)
    tokens = micro_batches(case)[0]

    def passes() -> None:
        for _ in range(case.accumulation):
            scaled, _ = model(input_ids=tokens[:, :-1], targets=tokens[:, 1:], use_cache=False)
            scaled.backward()
        dist.barrier()  # a step also waits for the slowest rank

    dist.barrier()
    passes_s = fastest_s(passes, size.repeats)
    windows = case.micro_batch_size * case.accumulation
    flops = flops_per_token(case.shape, case.blocks, case.seq_len) * windows * case.seq_len
    flat = torch.nn.Parameter(torch.randn(parameters(case.shape).total))
    flat.grad = torch.randn_like(flat)
    optimizer = torch.optim.AdamW([flat], fused=True)
    dist.barrier()
    update_s = fastest_s(optimizer.step, 3 * size.repeats)
    found = {"flops_per_s": flops / passes_s, "update_s_a_parameter": update_s / flat.numel()}
    for name, count in (("small_s", SMALL_BYTES), ("large_s", LARGE_BYTES)):
        payload = torch.zeros(count // 4)
        dist.barrier()
        found[name] = fastest_s(lambda payload=payload: dist.all_reduce(payload), 5 * size.repeats)  # type: ignore[misc]
    return found


def measure(size: Size, world: World) -> dict[str, Any]:
    """Seconds of this program's step."""
    case = size.case(world.size)
    engine, layout = build_engine(case, world)
    batches = micro_batches(case, world.rank)
    engine.train_step(batches, lr=1e-3)
    found = fastest_s(lambda: engine.train_step(batches, lr=1e-3), size.repeats)
    engine.close()
    return {"step_s": found, "layout": layout}


def link_of(calibration: dict[str, float], ranks: int) -> Link:
    """Latency and bandwidth that explain two all-reduces."""
    payloads = (SMALL_BYTES, LARGE_BYTES)
    small, large = (Transfer("x", "all_reduce", 1, float(count)) for count in payloads)
    seconds_a_byte = (calibration["large_s"] - calibration["small_s"]) / (
        large.wire_bytes(ranks, "gloo") - small.wire_bytes(ranks, "gloo")
    )
    latency = calibration["small_s"] - small.wire_bytes(ranks, "gloo") * seconds_a_byte
    return Link(1.0 / seconds_a_byte, max(latency, 0.0) / small.messages(ranks), "gloo")


def predict(
    size: Size, ranks: int, layout: ZeroSettings, alone: dict[str, float], full: dict[str, float]
) -> dict[str, float]:
    """Seconds of a step by part, from the calibrations of one rank alone and of one rank per core at once (`full`)."""
    case, cores = size.case(ranks), os.cpu_count() or 1
    rates = alone if ranks == 1 else full
    share = min(1.0, cores / ranks)  # of a core, for each rank
    tokens = case.micro_batch_size * case.accumulation * case.seq_len
    flops = tokens * flops_per_token(case.shape, case.blocks, case.seq_len)
    sent = transfers(tensors(case.shape, case.blocks), layout, accumulation=case.accumulation)
    communication_s = 0.0
    if ranks > 1:
        link = link_of(full, min(ranks, cores))
        communication_s = link.seconds(sent, ranks) / share
    optimizer_s = rates["update_s_a_parameter"] * parameters(case.shape).total / ranks / share
    rate = rates["flops_per_s"] * share
    step_s = flops / rate + communication_s + optimizer_s
    return {"step_s": step_s, "passes_s": flops / rate, "communication_s": communication_s, "optimizer_s": optimizer_s}


def work(world: World, part: str, *, rehearse: bool) -> dict[str, Any]:
    """Figures of one part; all ranks call it."""
    from inheritune_ds.distributed.environment import keep_freed_memory

    keep_freed_memory()
    size = REHEARSAL if rehearse else FULL
    return calibrate(size, world) if part == "calibrate" else measure(size, world)


def launched(part: str, ranks: int, *, rehearse: bool) -> dict[str, Any]:
    """Run one part on a number of ranks."""
    found: dict[str, Any] = on_ranks("benchmarks.predict:work", {"part": part, "rehearse": rehearse}, ranks)
    return found


def main() -> None:
    """Calibrate, predict, measure, write the JSON file."""
    text = "a small model and few steps, for a test: no bar"
    args = command_line("predict", __doc__, rehearse=text).parse_args()
    size = REHEARSAL if args.rehearse else FULL
    cores, load = os.cpu_count() or 1, [os.getloadavg()[0]]
    print(f"calibrating one rank, then {cores} at once", flush=True)
    alone = launched("calibrate", 1, rehearse=args.rehearse)
    full = launched("calibrate", max(cores, 2), rehearse=args.rehearse)
    rows = []
    print(f"{'ranks':>5}{'measured ms':>13}{'predicted':>11}{'passes':>9}{'comm.':>8}{'update':>8}{'ratio':>8}")
    for ranks in RANKS:
        measured = launched("measure", ranks, rehearse=args.rehearse)
        predicted = predict(size, ranks, measured["layout"], alone, full)
        ratio = predicted["step_s"] / measured["step_s"]
        rows.append({"ranks": ranks, "measured_s": measured["step_s"], "predicted": predicted, "ratio": ratio})
        ms = [f"{predicted[part] * 1e3:.1f}" for part in ("step_s", "passes_s", "communication_s", "optimizer_s")]
        print(
            f"{ranks:>5}{measured['step_s'] * 1e3:>13.1f}{ms[0]:>11}{ms[1]:>9}{ms[2]:>8}{ms[3]:>8}{ratio:>8.3f}",
            flush=True,
        )
    load.append(os.getloadavg()[0])
    worst = max(abs(row["ratio"] - 1.0) for row in rows)
    print(f"largest error: {worst:.1%}")
    calibration = {"alone": alone, "full": full}
    record(args, {"tolerance": TOLERANCE, "load": load, "calibration": calibration, "cases": rows})
    sys.exit(1 if worst > TOLERANCE and not args.rehearse else 0)


if __name__ == "__main__":
    main()
