"""The data loader: tokens/s of one core against nanoGPT's `get_batch`, the time of a seek, the size of the order.

`python -m benchmarks.loader` writes docs/results/loader.json. All read the same random tokens (uint16) from the page
cache, in turns (A B C D, D C B A), in one process with one thread: this program one file, 100 shards, and those shards
as seven sources with RedPajama's weights; nanoGPT's `get_batch`, copied from its train.py (subjects/nanogpt.py), the
file. This program's loader reads each window once per epoch and can begin at any step. A token is an input with its
target.

The seek is into plans of 10 billion tokens (100 shards, as sparse files), of one source and of seven with three changes
of weights and rounds of 10,000 windows: from opening the shards to the windows of a step. The memory is that of such a
stream after a look-up in every part of its plan.
"""

import argparse
import os
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.comparison import SEED, in_turns, ratios, summary, table
from benchmarks.record import command_line, record
from inheritune_ds.data.stream.batches import BatchStream
from inheritune_ds.data.stream.mixture import Weights, round_table
from inheritune_ds.data.stream.windows import TokenShards, Windows

VOCAB_SIZE = 50_304
PLAN_TOKENS = 10_000_000_000
SEEKS = 50
SHARDS = 100
ACCUMULATION = 16
LOADERS = ("project", "project_shards", "project_mixture", "nanogpt")
WEIGHTS = (134, 30, 9, 9, 9, 5, 4)
"""RedPajama's, as turns of a round (recipe preset redpajama-1t-sample)."""
SHARDS_OF_SOURCES = (67, 15, 5, 4, 4, 3, 2)
PLAN_WEIGHTS = ((6701, 1499, 450, 450, 450, 250, 200), (5001, 2999, 500, 500, 400, 400, 200), (1,) * 7, WEIGHTS)
PLANS = ("one_source", "seven_sources")


def write_shards(tokens: np.ndarray[Any, Any], folder: Path) -> list[tuple[Path, int]]:
    """Write tokens as shards; returns their files and counts."""
    parts = np.array_split(tokens, SHARDS)
    paths = [folder / f"train-{number:05}.bin" for number in range(SHARDS)]
    for path, part in zip(paths, parts, strict=True):
        part.tofile(path)
    return [(path, len(part)) for path, part in zip(paths, parts, strict=True)]


def sparse_shards(folder: Path) -> list[tuple[Path, int]]:
    """Sparse files with the size of the plan's shards."""
    paths = [folder / f"plan-{number:05}.bin" for number in range(SHARDS)]
    for path in paths:
        path.touch()
        os.truncate(path, 2 * PLAN_TOKENS // SHARDS)
    return [(path, PLAN_TOKENS // SHARDS) for path in paths]


def one_source(shards: Iterable[tuple[Path, int]], seq_len: int) -> dict[str, Windows]:
    """All shards as one source."""
    paths, counts = zip(*shards, strict=True)
    return {"tokens": Windows(TokenShards(paths, counts, "uint16"), seq_len)}


def seven_sources(shards: Sequence[tuple[Path, int]], seq_len: int) -> dict[str, Windows]:
    """The shards as seven sources."""
    ends = np.cumsum(SHARDS_OF_SOURCES).tolist()
    parts = [shards[end - count : end] for end, count in zip(ends, SHARDS_OF_SOURCES, strict=True)]
    return {f"source-{number}": one_source(part, seq_len)["tokens"] for number, part in enumerate(parts)}


def readers(folder: Path, num_tokens: int, seq_len: int, micro_batch: int) -> dict[str, Callable[[int], int]]:
    """For every loader, a function that reads a number of micro-batches and returns their tokens."""
    from benchmarks.subjects.nanogpt import get_batch

    tokens = np.random.default_rng(SEED).integers(VOCAB_SIZE, size=num_tokens, dtype=np.uint16)
    path = folder / "tokens.bin"
    tokens.tofile(path)
    shards = write_shards(tokens, folder)
    batch_windows = micro_batch * ACCUMULATION
    weights = [Weights(0, WEIGHTS)]

    def nanogpt(count: int) -> int:
        return sum(get_batch(str(path), micro_batch, seq_len, "cpu")[0].numel() for _ in range(count))

    streams = {
        "project": BatchStream(one_source([(path, num_tokens)], seq_len), seed=SEED, batch_windows=batch_windows),
        "project_shards": BatchStream(one_source(shards, seq_len), seed=SEED, batch_windows=batch_windows),
        "project_mixture": BatchStream(
            seven_sources(shards, seq_len), seed=SEED, batch_windows=batch_windows, weights=weights
        ),
    }
    return {name: _reader(stream, micro_batch) for name, stream in streams.items()} | {"nanogpt": nanogpt}


def _reader(stream: BatchStream, micro_batch: int) -> Callable[[int], int]:
    steps = iter(range(sys.maxsize))

    def read(count: int) -> int:
        tokens = 0
        for _ in range(0, count, ACCUMULATION):
            for batch in stream.micro_batches(next(steps), rank=0, world_size=1, micro_batch_size=micro_batch):
                tokens += batch.shape[0] * (batch.shape[1] - 1)
        return tokens

    return read


def timed(read: Callable[[int], int], count: int) -> tuple[int, float]:
    """Tokens read, and the seconds."""
    start = time.perf_counter()
    return read(count), time.perf_counter() - start


def throughput(reading: dict[str, Callable[[int], int]], rounds: int, block_s: float) -> dict[str, list[float]]:
    """Tokens/s of every loader, by round; an uncounted first block sets the length of the others."""
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


def open_plan(name: str, shards: Sequence[tuple[Path, int]], seq_len: int, batch_windows: int) -> BatchStream:
    """Open a stream of one of the plans."""
    round_table.cache_clear()
    if name == "one_source":
        return BatchStream(one_source(shards, seq_len), seed=SEED, batch_windows=batch_windows)
    quarter = PLAN_TOKENS // seq_len // len(PLAN_WEIGHTS)
    weights = [Weights(number * quarter, turns) for number, turns in enumerate(PLAN_WEIGHTS)]
    return BatchStream(seven_sources(shards, seq_len), seed=SEED, batch_windows=batch_windows, weights=weights)


def seek_seconds(open_stream: Callable[[], BatchStream]) -> list[float]:
    """Seconds from opening a stream to the windows of a step, at random steps."""
    stream = open_stream()
    steps = np.random.default_rng(SEED).integers(stream.num_windows // stream.batch_windows, size=SEEKS)
    seconds = []
    for step in steps.tolist():
        start = time.perf_counter()
        open_stream().draw(step)
        seconds.append(time.perf_counter() - start)
    return seconds


def held_bytes(open_stream: Callable[[], BatchStream]) -> int:
    """Memory of a stream, without memory maps, after look-ups in all parts of its plan."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    stream = open_stream()
    total_steps = stream.num_windows // stream.batch_windows
    for step in range(0, total_steps, total_steps // 20):
        stream.draw(step)
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert stream.num_windows  # it is still there
    return held


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write the JSON file."""
    parser = command_line("loader", __doc__, rehearse="a toy: it tests this command, and measures nothing")
    add = parser.add_argument
    add("--tokens", type=int, default=100_000_000, help="tokens of the file (default: 100 million, 200 MB)")
    add("--seq-len", type=int, default=1024)
    add("--micro-batch", type=int, default=16)
    add("--rounds", type=int, default=15, help="blocks of each loader (default: 15)")
    add("--seconds", type=float, default=1.0, help="length of a block, about (default: 1)")
    args = parser.parse_args(arguments)
    if args.rehearse:
        args.tokens, args.rounds, args.seconds = 1_000_000, 4, 0.01
    figures = measure(args)
    print(*lines_of(figures), sep="\n", flush=True)
    record(args, {"rehearsal": args.rehearse, **figures})
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            reading = readers(Path(folder), args.tokens, args.seq_len, args.micro_batch)
            found = throughput(reading, args.rounds, args.seconds)
    finally:
        torch.set_num_threads(threads)
    seeks, memory = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        shards = sparse_shards(Path(folder))
        for plan in PLANS:
            opening = partial(open_plan, plan, shards, args.seq_len, ACCUMULATION * args.micro_batch)
            seeks[plan] = summary([seek_seconds(opening)])
            memory[plan] = held_bytes(opening)
    return {
        "seq_len": args.seq_len,
        "micro_batch": args.micro_batch,
        "file_tokens": args.tokens,
        "shards": SHARDS,
        "tokens_per_s_per_core": {name: summary([rates]) for name, rates in found.items()},
        "over_nanogpt": {name: summary([ratios(found, name, "nanogpt")]) for name in LOADERS if name != "nanogpt"},
        "plan_tokens": PLAN_TOKENS,
        "seek_s": seeks,
        "order_bytes": memory,
    }


def lines_of(figures: dict[str, Any]) -> list[str]:
    """The figures as a table."""
    speeds = figures["tokens_per_s_per_core"].items()
    rates = [(f"{name}: tokens/s of one core", found, ",.0f") for name, found in speeds]
    compared = [(f"{name} over nanogpt", found, ".3f") for name, found in figures["over_nanogpt"].items()]
    sought = [
        (f"{name}: seek into 10 billion tokens, ms", _in_ms(found), ".3f") for name, found in figures["seek_s"].items()
    ]
    lines = table("", [*rates, *compared, *sought])
    for name, held in figures["order_bytes"].items():
        lines.append(f"{f'{name}: memory of the order, bytes':<46}{held:>14,}")
    return lines


def _in_ms(found: dict[str, Any]) -> dict[str, Any]:
    scaled = {key: 1e3 * found[key] for key in ("median", "min", "max")}
    return {**scaled, "interval_95": [1e3 * bound for bound in found["interval_95"]]}


if __name__ == "__main__":
    sys.exit(main())
