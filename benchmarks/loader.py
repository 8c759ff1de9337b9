"""The data loader: tokens/s of one core against nanoGPT's `get_batch`, the time of a seek, the size of the order.

`python -m benchmarks.loader` writes docs/results/loader.json. Both read the same file of random tokens (uint16), which
lies in the page cache, in turns (A B B A), in one process with one thread. `get_batch` is written out after nanoGPT's
train.py (subjects/nanogpt.py); this program's loader gives each window once an epoch and may begin at any step. A token
is an input whose target is given with it. The seek is into a plan of 10 billion tokens: from nothing to the window ids
of a step.
"""

import argparse
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.comparison import SEED, in_turns, summary
from benchmarks.record import RESULTS, write_result
from inheritune_ds.data.stream import BatchStream, TokenWindows, WindowOrder

VOCAB_SIZE = 50_304
PLAN_TOKENS = 10_000_000_000
SEEKS = 50
LOADERS = ("project", "nanogpt")


def readers(path: Path, seq_len: int, micro_batch: int) -> dict[str, Callable[[int], int]]:
    """For every loader a function that reads so many micro-batches and returns their tokens."""
    from benchmarks.subjects.nanogpt import get_batch

    accumulation = 16
    windows = TokenWindows(path, "uint16", seq_len, path.stat().st_size // 2)
    stream = BatchStream(windows, WindowOrder(len(windows), SEED), micro_batch * accumulation)
    steps = iter(range(sys.maxsize))

    def project(count: int) -> int:
        tokens = 0
        for _ in range(0, count, accumulation):
            for batch in stream.micro_batches(next(steps), rank=0, world_size=1, micro_batch_size=micro_batch):
                tokens += batch.shape[0] * (batch.shape[1] - 1)
        return tokens

    def nanogpt(count: int) -> int:
        return sum(get_batch(str(path), micro_batch, seq_len, "cpu")[0].numel() for _ in range(count))

    return {"project": project, "nanogpt": nanogpt}


def timed(read: Callable[[int], int], count: int) -> tuple[int, float]:
    """Tokens read, and the seconds they took."""
    start = time.perf_counter()
    return read(count), time.perf_counter() - start


def throughput(reading: dict[str, Callable[[int], int]], rounds: int, block_s: float) -> dict[str, list[float]]:
    """Tokens/s of every loader, round by round; a first block is not counted and decides the length of the others."""
    counts = {}
    for name, read in reading.items():
        timed(read, 16)
        counts[name] = 16 * max(1, round(block_s / timed(read, 16)[1]))
    found: dict[str, list[float]] = {name: [] for name in reading}
    for turn in in_turns(LOADERS, rounds):
        for name in turn:
            tokens, seconds = timed(reading[name], counts[name])
            found[name].append(tokens / seconds)
            print(f"  {name:<10}{found[name][-1]:16,.0f} tokens/s", flush=True)
    return found


def seek_seconds(num_windows: int, batch_windows: int) -> list[float]:
    """Seconds from nothing to the window ids of a step, at random steps of a plan of so many windows."""
    steps = np.random.default_rng(SEED).integers(num_windows // batch_windows, size=SEEKS)
    seconds = []
    for step in steps:
        start = time.perf_counter()
        first = int(step) * batch_windows
        WindowOrder(num_windows, SEED).at(np.arange(first, first + batch_windows, dtype=np.int64))
        seconds.append(time.perf_counter() - start)
    return seconds


def order_bytes(num_windows: int) -> int:
    """Memory that an order of so many windows holds."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    order = WindowOrder(num_windows, SEED)
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert order.num_windows == num_windows  # it is still there
    return held


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write the JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--tokens", type=int, default=100_000_000, help="tokens of the file (default: 100 million, 200 MB)")
    add("--seq-len", type=int, default=1024)
    add("--micro-batch", type=int, default=16)
    add("--rounds", type=int, default=15, help="blocks of each loader (default: 15)")
    add("--seconds", type=float, default=1.0, help="length of a block, about (default: 1)")
    add("--rehearse", action="store_true", help="a toy: it tests this command, and measures nothing")
    add("--out", type=Path, help="JSON file (default: docs/results/loader.json; of a rehearsal: a temporary file)")
    args = parser.parse_args(arguments)
    if args.rehearse:
        args.tokens, args.rounds, args.seconds = 1_000_000, 4, 0.01
    figures = measure(args)
    print(*lines_of(figures), sep="\n", flush=True)
    out = args.out or (Path(tempfile.mkdtemp()) if args.rehearse else RESULTS) / "loader.json"
    write_result(out, {"rehearsal": args.rehearse, **figures})
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tokens.bin"
            generator = np.random.default_rng(SEED)
            generator.integers(VOCAB_SIZE, size=args.tokens, dtype=np.uint16).tofile(path)
            found = throughput(readers(path, args.seq_len, args.micro_batch), args.rounds, args.seconds)
    finally:
        torch.set_num_threads(threads)
    num_windows = PLAN_TOKENS // args.seq_len
    seconds = seek_seconds(num_windows, 16 * args.micro_batch)
    ratios = [own / other for own, other in zip(found["project"], found["nanogpt"], strict=True)]
    return {
        "seq_len": args.seq_len,
        "micro_batch": args.micro_batch,
        "file_tokens": args.tokens,
        "tokens_per_s_per_core": {name: summary([rates]) for name, rates in found.items()},
        "project_over_nanogpt": summary([ratios]),
        "plan_tokens": PLAN_TOKENS,
        "seek_s": summary([seconds]),
        "order_bytes": order_bytes(num_windows),
    }


def lines_of(figures: dict[str, Any]) -> list[str]:
    """The figures as a table."""
    rates, ratio, seek = figures["tokens_per_s_per_core"], figures["project_over_nanogpt"], figures["seek_s"]
    row = "{:<34}{:>16}  {:>26}  {:>28}"
    lines = [row.format("", "median", "95 % interval", "range")]
    for name, found in rates.items():
        interval = "{:,.0f} to {:,.0f}".format(*found["interval_95"])
        span = f"{found['min']:,.0f} to {found['max']:,.0f}"
        lines.append(row.format(f"{name}: tokens/s of one core", f"{found['median']:,.0f}", interval, span))
    for name, found, scale in (("project over nanogpt", ratio, 1.0), ("seek into 10 billion tokens, ms", seek, 1e3)):
        low, high = found["interval_95"]
        interval = f"{scale * low:.3f} to {scale * high:.3f}"
        span = f"{scale * found['min']:.3f} to {scale * found['max']:.3f}"
        lines.append(row.format(name, f"{scale * found['median']:.3f}", interval, span))
    lines.append(row.format("memory of the order, bytes", f"{figures['order_bytes']:,}", "", "").rstrip())
    return lines


if __name__ == "__main__":
    sys.exit(main())
