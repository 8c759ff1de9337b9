"""Cost of a checkpoint: against writing and fsyncing the same bytes plainly, and against no copy at all.

`python -m benchmarks.checkpoint` writes docs/results/checkpoint.json. A real engine (ZeRO-1, bf16) of each number of
ranks saves in turns with a plain writer (A B C, C B A, ...): each rank writes the bytes of its own files, which lie in
its memory, to as many files of the same sizes, 8 MiB a call, fsyncs them, and waits for the others. Nothing is hashed,
renamed or listed there.

    plain   write and fsync
    sync    `save` until it returns: capture, hash, write, fsync, manifest, rename, pointer
    async   `save` until it returns (`blocked`), and until the checkpoint is published

Ratios are taken within a round, so a change of a shared disk affects all three. The hashing speed of
one thread is measured as well, for BLAKE3, the hash of checkpoints, and sha256.
"""

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from benchmarks.comparison import Comparison, in_turns, judged, summary, table
from benchmarks.ranks import Case, build_engine, build_saver, micro_batches, on_ranks
from benchmarks.record import command_line, record
from inheritune_ds.checkpoints.fragments import file_name
from inheritune_ds.checkpoints.manifest import published, read_manifest
from inheritune_ds.checkpoints.store import CheckpointStore
from inheritune_ds.checkpoints.train_state import TrainState

if TYPE_CHECKING:
    from inheritune_ds.distributed.world import World
    from inheritune_ds.training.engine import Engine

WRITERS = ("plain", "sync", "async")
PIECE_BYTES = 1 << 23
HASHED_BYTES = 1 << 28
COMPARISONS = (
    Comparison("sync over plain", "sync", "plain", bar=1.25, at_most=True),
    Comparison("async, until published, over plain", "async", "plain"),
    Comparison("async, blocked, over plain", "blocked", "plain", bar=0.15, at_most=True),
    Comparison("async, blocked, over sync", "blocked", "sync"),
)


class Writers:
    """The three ways for one rank; each returns seconds, all ranks call each together."""

    def __init__(self, engine: "Engine", world: "World", folder: Path) -> None:
        self._engine, self._folder, self._step = engine, folder, 0
        self._world = world

        self._checkpoints = {
            name: build_saver(
                world, CheckpointStore(folder / name, keep=1), async_save=name == "async", on_save_error="stop"
            )
            for name in ("sync", "async")
        }
        self._content = b""

    def prepare(self) -> int:
        """Save once each way, unmeasured; keep this rank's files in memory for the plain writer; bytes of all ranks."""
        for name in self._checkpoints:
            self.ours(name)
        newest = next(published(self._folder / "sync"))
        self._content = (newest / file_name(self._world.rank)).read_bytes()
        manifest = read_manifest(newest)
        assert manifest is not None
        return int(sum(entry["bytes"] for entry in manifest["files"].values()))

    def plain(self) -> dict[str, float]:
        """Write and fsync the same bytes."""
        import torch.distributed as dist

        folder, view = self._folder / f"plain-{self._world.rank}", memoryview(self._content)
        dist.barrier()
        start_s = time.perf_counter()
        folder.mkdir()
        with (folder / "content").open("wb", buffering=0) as file:
            while view:
                view = view[file.write(view[:PIECE_BYTES]) :]
            os.fsync(file.fileno())
        dist.barrier()
        seconds = time.perf_counter() - start_s
        shutil.rmtree(folder)
        return {"plain": seconds}

    def ours(self, name: str) -> dict[str, float]:
        """Save a checkpoint."""
        import torch.distributed as dist

        checkpoints = self._checkpoints[name]
        self._step += 1
        dist.barrier()
        start_s = time.perf_counter()
        assert checkpoints.save(self._engine, TrainState(step=self._step))
        blocked_s = time.perf_counter() - start_s
        assert checkpoints.wait()  # the previous one is read back and deleted meanwhile
        return {name: checkpoints.last_save_s, **({"blocked": blocked_s} if name == "async" else {})}

    def measure(self, rounds: int) -> list[dict[str, float]]:
        """Seconds of every way, round by round."""
        found = []
        for turn in in_turns(WRITERS, rounds):
            seconds: dict[str, float] = {}
            for name in turn:
                os.sync()  # unwritten data of an earlier turn is not part of this one
                seconds |= self.plain() if name == "plain" else self.ours(name)
            found.append(seconds)
            line = "".join(f"{name} {seconds[name]:7.3f} s  " for name in (*WRITERS, "blocked"))
            print(f">   {line}", flush=True)
        return found


def measure_rank(world: "World", folder: str, mib: int, rounds: int) -> dict[str, Any]:
    """Bytes of a checkpoint of about `mib` MiB, and the seconds of every way, round by round; all ranks call it."""
    from inheritune_ds.distributed.environment import keep_freed_memory

    keep_freed_memory()  # as a run does
    hidden = max(64, round((mib * 2**20 / 14 / 50) ** 0.5) // 64 * 64)  # 14 bytes a parameter
    case = Case(hidden_size=hidden, seq_len=16)
    engine, _ = build_engine(case, world)
    engine.train_step(micro_batches(case, world.rank), lr=1e-3)  # the moments are made by the first step
    writers = Writers(engine, world, Path(folder))
    size = writers.prepare()
    if world.is_main:
        print(f"> {world.size} ranks, {size / 2**20:,.0f} MiB a checkpoint", flush=True)
    return {"bytes": size, "rounds": writers.measure(rounds)}


def measure(args: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """Figures of a number of ranks, in a process group of its own."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        arguments = {"folder": folder, "mib": args.mib, "rounds": args.rounds}
        found = on_ranks("benchmarks.checkpoint:measure_rank", arguments, ranks, timeout_s=1800.0)
    ratios = {
        each.name: judged(each, [[seconds[each.above] / seconds[each.below] for seconds in found["rounds"]]])
        for each in COMPARISONS
    }
    plain = [found["bytes"] / 2**20 / seconds["plain"] for seconds in found["rounds"]]
    return {"bytes": found["bytes"], "plain_mib_per_s": summary([plain]), "ratios": ratios, "seconds": found["rounds"]}


def hash_rates(rounds: int) -> dict[str, Any]:
    """GiB/s of one thread, the two hashes in turns, over bytes that lie in memory."""
    content = os.urandom(HASHED_BYTES)
    rates: dict[str, list[float]] = {"blake3": [], "sha256": []}
    for _ in range(rounds):
        for name, digest in (("blake3", blake3()), ("sha256", hashlib.sha256())):
            start_s = time.perf_counter()
            digest.update(content)
            rates[name].append(HASHED_BYTES / 2**30 / (time.perf_counter() - start_s))
    return {name: summary([found]) for name, found in rates.items()}


def lines_of(figures: dict[str, Any]) -> list[str]:
    """The figures as a table."""
    ratios = [
        (f"{ranks} ranks: {name}", ratio, ".3f")
        for ranks, found in figures["ranks"].items()
        for name, ratio in found["ratios"].items()
    ]
    rates = [(f"{name}, GiB/s of one thread", rate, ".2f") for name, rate in figures["hash_gib_per_s"].items()]
    return table("", [*ratios, *rates])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write the JSON file."""
    parser = command_line("checkpoint", __doc__, rehearse="a toy: it tests this command, and measures nothing")
    add = parser.add_argument
    add("--mib", type=int, default=512, help="size of a checkpoint, about (default: 512 MiB)")
    add("--rounds", type=int, default=24, help="saves of each kind (default: 24)")
    add("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks (default: 1 2)")
    add("--scratch", type=Path, help="where to write (default: the folder for temporary files)")
    args = parser.parse_args(arguments)
    if args.rehearse:
        args.mib, args.rounds = 4, 4
    figures = {
        "mib": args.mib,
        "order": [" ".join(turn) for turn in in_turns(WRITERS, args.rounds)],
        "ranks": {str(ranks): measure(args, ranks) for ranks in args.ranks},
        "hash_gib_per_s": hash_rates(args.rounds),
    }
    print(*lines_of(figures), sep="\n", flush=True)
    record(args, {"rehearsal": args.rehearse, **figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
