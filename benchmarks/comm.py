"""Compare calls and bytes per optimizer step, counted below deepspeed.comm on gloo, with the planner's.

`python -m benchmarks.comm` starts two ranks, which train steps of 16 windows each for accumulation 1, 4, 16 and ZeRO
1, 2, 3 in one process group, and writes docs/results/comm.json. Payloads of torch's collectives are counted in the
dispatcher, for any caller; the loopback's counters have gloo's actual bytes, of all processes of the machine. The bar:
ZeRO-1 is the same for every accumulation, and payloads are within 2 % of the planner's. The exit code is 1 if it is
missed.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.ranks import Case, build_engine, micro_batches, on_ranks
from benchmarks.record import command_line, record
from inheritune_ds.config.zero import Precision
from inheritune_ds.plan.communication import transfers
from inheritune_ds.plan.model_size import tensors

RANKS = 2
WINDOWS = 16
ACCUMULATIONS = (1, 4, 16)
STAGES = (1, 2, 3)
WARM_UP_STEPS, STEPS = 2, 2  # the first records the order of ZeRO-3's parameters
TOLERANCE = 0.02
_NAMES = {
    "c10d::allreduce_": "all_reduce",
    "c10d::_allgather_base_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
}


def cases(precision: Precision, blocks: int) -> list[Case]:
    """The engines: the same windows per step in different micro-batches."""
    size: dict[str, Any] = {"precision": precision, "hidden_size": 64, "blocks": blocks, "seq_len": 32}
    return [
        Case(stage, micro_batch_size=WINDOWS // cut, accumulation=cut, **size)
        for stage in STAGES
        for cut in ACCUMULATIONS
    ]


def count(case: Case, world: Any) -> dict[str, Any]:
    """Train some steps; return calls and payload bytes of each collective per step and rank."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.name()
            if name.startswith("c10d::"):
                kind = found[_NAMES.get(name, name)]
                kind[0] += 1
                kind[1] += max(map(_nbytes, args[:2]))  # the larger of output and input is the whole tensor
            return func(*args, **(kwargs or {}))

    engine, layout = build_engine(case, world)
    batches = micro_batches(case, world.rank)
    for _ in range(WARM_UP_STEPS):
        engine.train_step(batches, lr=1e-3)
    before = _loopback_bytes()
    with Counter():  # type: ignore[no-untyped-call]
        for _ in range(STEPS):
            engine.train_step(batches, lr=1e-3)
    sent = (_loopback_bytes() - before) / RANKS / STEPS
    engine.close()
    planned = transfers(tensors(case.shape, case.blocks), layout, accumulation=case.accumulation)
    expected: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for part in planned:
        kind = expected[part.collective]
        kind[0] += part.calls
        kind[1] += part.payload_bytes
    return {
        "case": case.name,
        "stage": case.stage,
        "accumulation": case.accumulation,
        "counted": {name: [calls / STEPS, size / STEPS] for name, (calls, size) in found.items()},
        "planned": dict(expected),
        "loopback_bytes": sent,
        "planned_gloo_bytes": sum(part.wire_bytes(world.size, "gloo") for part in planned),
        "planned_nccl_bytes": sum(part.wire_bytes(world.size) for part in planned),
    }


def _nbytes(argument: Any) -> int:
    if isinstance(argument, list | tuple):
        return sum(map(_nbytes, argument))
    return int(getattr(argument, "nbytes", 0))


def _loopback_bytes() -> int:
    lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    return next(int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:"))


def total(kinds: dict[str, list[float]], place: int) -> float:
    """Calls (place 0) or bytes (1) of all collectives."""
    return sum(kind[place] for kind in kinds.values())


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """The violations of the bar."""
    bad = [
        f"{row['case']}: {what} counted {total(row['counted'], place):.0f}, planned {total(row['planned'], place):.0f}"
        for row in rows
        for what, place in (("bytes", 1), ("calls", 0))
        if abs(total(row["planned"], place) / total(row["counted"], place) - 1.0) > TOLERANCE
    ]
    first = [json.dumps(row["counted"], sort_keys=True) for row in rows if row["stage"] == 1]
    return bad + ["ZeRO-1 depends on the accumulation"] * (len(set(first)) > 1)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print one line per case."""
    print(f"{'case':<34}{'calls':>8}{'planned':>9}{'KiB payload':>13}{'planned':>9}{'KiB on lo':>11}{'planned':>9}")
    for row in rows:
        sizes = (total(row["counted"], 1), total(row["planned"], 1), row["loopback_bytes"], row["planned_gloo_bytes"])
        kib = [f"{size / 1024:.0f}" for size in sizes]
        print(
            f"{row['case']:<34}{total(row['counted'], 0):>8.0f}{total(row['planned'], 0):>9.0f}{kib[0]:>13}{kib[1]:>9}"
            f"{kib[2]:>11}{kib[3]:>9}"
        )


def count_all(world: Any, precision: Precision, blocks: int) -> list[dict[str, Any]]:
    """A row per case; all ranks call it."""
    rows = []
    for case in cases(precision, blocks):
        rows.append(count(case, world))
        if world.is_main:
            print(f"> {case.name}", flush=True)
    return rows


def main() -> None:
    """Count, compare, write the JSON file."""
    parser = command_line("comm", __doc__, rehearse="a model of one block instead of four")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="(default: bf16)")
    args = parser.parse_args()
    arguments = {"precision": args.precision, "blocks": 1 if args.rehearse else 4}
    rows = on_ranks("benchmarks.comm:count_all", arguments, RANKS)
    print_table(rows)
    missed = verdicts(rows)
    print("\n".join(missed) or f"all within {TOLERANCE:.0%} of the planner; ZeRO-1 is the same for every accumulation")
    record(args, {"ranks": RANKS, "steps": STEPS, "cases": rows, "missed": missed})
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
