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
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from benchmarks.comparison import Comparison, in_turns, summary, verdict
from benchmarks.ranks import Case, build_engine, join_ranks, micro_batches, run_ranks
from benchmarks.record import RESULTS, write_result
from inheritune_ds.checkpoints.fragments import file_name
from inheritune_ds.checkpoints.manifest import published, read_manifest
from inheritune_ds.checkpoints.store import CheckpointStore
from inheritune_ds.checkpoints.train_state import SavedLayout, TrainState

if TYPE_CHECKING:
    from inheritune_ds.checkpoints.saver import Saver
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
        from inheritune_ds.checkpoints.saver import Saver
        from inheritune_ds.config.reliability import Reliability

        self._engine, self._folder, self._step = engine, folder, 0
        self._world = world

        def make(name: str, *, background: bool) -> Saver:
            return Saver(
                CheckpointStore(folder / name, keep=1),
                layout=SavedLayout(world.size, 1, "bf16"),
                world=world,
                reliability=Reliability(async_save=background, on_save_error="stop"),
                fingerprints={},
            )

        self._checkpoints = {"sync": make("sync", background=False), "async": make("async", background=True)}
        self._shards: dict[str, bytes] = {}

    def prepare(self) -> int:
        """Save once each way, unmeasured; keep this rank's files in memory for the plain writer; bytes of all ranks."""
        for name in self._checkpoints:
            self.ours(name)
        newest = next(published(self._folder / "sync"))
        name = file_name(self._world.rank)
        self._shards = {name: (newest / name).read_bytes()}
        manifest = read_manifest(newest)
        assert manifest is not None
        return int(sum(entry["bytes"] for entry in manifest["files"].values()))

    def plain(self) -> dict[str, float]:
        """Write and fsync the same bytes to the same number of files."""
        import torch.distributed as dist

        folder = self._folder / f"plain-{self._world.rank}"
        dist.barrier()
        start_s = time.perf_counter()
        folder.mkdir()
        for name, content in self._shards.items():
            view = memoryview(content)
            with (folder / Path(name).name).open("wb", buffering=0) as file:
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

        checkpoints: Saver = self._checkpoints[name]
        self._step += 1
        dist.barrier()
        start_s = time.perf_counter()
        assert checkpoints.save(self._engine, TrainState(step=self._step))
        blocked_s = time.perf_counter() - start_s
        assert checkpoints.wait()  # the previous one is read back and deleted meanwhile
        return {name: checkpoints.last_save_s, **({"blocked": blocked_s} if name == "async" else {})}

    def measure(self, rounds: int) -> list[dict[str, float]]:
        """Seconds of every way, round by round."""
        ways: dict[str, Callable[[], dict[str, float]]] = {
            "plain": self.plain,
            "sync": lambda: self.ours("sync"),
            "async": lambda: self.ours("async"),
        }
        found = []
        for turn in in_turns(WRITERS, rounds):
            seconds: dict[str, float] = {}
            for name in turn:
                os.sync()  # unwritten data of an earlier turn is not part of this one
                seconds |= ways[name]()
            found.append(seconds)
            line = "".join(f"{name} {seconds[name]:7.3f} s  " for name in (*WRITERS, "blocked"))
            print(f">   {line}", flush=True)
        return found


def rank_main(args: argparse.Namespace) -> None:
    """Measure on one rank; rank 0 writes the result."""
    world = join_ranks()
    from inheritune_ds.distributed.environment import keep_freed_memory

    keep_freed_memory()  # as a run does
    case = case_of(args)
    engine, _ = build_engine(case, world)
    engine.train_step(micro_batches(case, world.rank), lr=1e-3)  # the moments are made by the first step
    writers = Writers(engine, world, args.folder)
    size = writers.prepare()
    if world.is_main:
        print(f"> {world.size} ranks, {size / 2**20:,.0f} MiB a checkpoint", flush=True)
    found = {"bytes": size, "rounds": writers.measure(args.rounds)}
    if world.is_main:
        (args.folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


def case_of(args: argparse.Namespace) -> Case:
    """A model of about `args.mib` MiB of checkpoint: 14 bytes a parameter."""
    hidden = max(64, round((args.mib * 2**20 / 14 / 50) ** 0.5) // 64 * 64)
    return Case(precision="bf16", hidden_size=hidden, blocks=4, vocab_size=1024, seq_len=16)


def measure(args: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """Figures of a number of ranks, in a process group of its own."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        words = ["--rank-folder", folder, "--mib", str(args.mib), "--rounds", str(args.rounds)]
        run_ranks("benchmarks.checkpoint", words, ranks, timeout_s=1800.0)
        found = json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))
    ratios = {}
    for comparison in COMPARISONS:
        rounds = [seconds[comparison.above] / seconds[comparison.below] for seconds in found["rounds"]]
        ratio = summary([rounds])
        ratios[comparison.name] = {**ratio, "bar": comparison.bar, "verdict": verdict(ratio, comparison)}
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
    row = "{:<44}{:>8}  {:>18}  {:>18}  {}"
    lines = [row.format("", "median", "95 % interval", "range", "").rstrip()]
    for ranks, found in figures["ranks"].items():
        for name, ratio in found["ratios"].items():
            interval = "{:.2f} to {:.2f}".format(*ratio["interval_95"])
            span = f"{ratio['min']:.2f} to {ratio['max']:.2f}"
            bar = f"at most {ratio['bar']}: {ratio['verdict']}" if ratio["bar"] is not None else ""
            lines.append(row.format(f"{ranks} ranks: {name}", f"{ratio['median']:.3f}", interval, span, bar).rstrip())
    for name, rate in figures["hash_gib_per_s"].items():
        interval = "{:.2f} to {:.2f}".format(*rate["interval_95"])
        span = f"{rate['min']:.2f} to {rate['max']:.2f}"
        lines.append(row.format(f"{name}, GiB/s of one thread", f"{rate['median']:.2f}", interval, span, "").rstrip())
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write the JSON file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--mib", type=int, default=512, help="size of a checkpoint, about (default: 512 MiB)")
    add("--rounds", type=int, default=24, help="saves of each kind (default: 24)")
    add("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks (default: 1 2)")
    add("--scratch", type=Path, help="where to write (default: the folder for temporary files)")
    add("--rehearse", action="store_true", help="a toy: it tests this command, and measures nothing")
    add("--out", type=Path, help="JSON file (default: docs/results/checkpoint.json; of a rehearsal: a temporary file)")
    add("--rank-folder", dest="folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.folder is not None:
        rank_main(args)
        return 0
    if args.rehearse:
        args.mib, args.rounds = 4, 4
    figures = {
        "mib": args.mib,
        "order": [" ".join(turn) for turn in in_turns(WRITERS, args.rounds)],
        "ranks": {str(ranks): measure(args, ranks) for ranks in args.ranks},
        "hash_gib_per_s": hash_rates(args.rounds),
    }
    print(*lines_of(figures), sep="\n", flush=True)
    out = args.out or (Path(tempfile.mkdtemp()) if args.rehearse else RESULTS) / "checkpoint.json"
    write_result(out, {"rehearsal": args.rehearse, **figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
