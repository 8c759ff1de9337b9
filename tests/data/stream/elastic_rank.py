"""A rank of `test_elastic.py`: it reads steps ahead as the training loop does and logs every window it had."""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inheritune_ds.data.stream.batches import BatchStream
from inheritune_ds.data.stream.windows import TokenShards, Windows
from inheritune_ds.training.prefetch import Prefetcher

SEQ_LEN, BATCH, SEED = 16, 12, 1337
SHARDS = {"books": [2500, 1, 3000, 855], "web": [4200, 17]}
"""Tokens of every shard; windows reach over their ends."""
PACE_S = 0.003
"""How long a step takes."""


def open_stream(folder: Path) -> BatchStream:
    sources = {
        name: Windows(TokenShards([folder / f"{name}-{n}.bin" for n in range(len(counts))], counts, "uint32"), SEQ_LEN)
        for name, counts in SHARDS.items()
    }
    return BatchStream(sources, seed=SEED, batch_windows=BATCH)


@dataclass(frozen=True)
class Start:
    """How the ranks are started.

    Attributes:
        folder: Of the shards.
        world_size: Ranks.
        micro_batch_size: Windows a rank takes at a time.
        steps: To be done; a rank that is to be killed waits there for its end.
        killed: Whether it is.
    """

    folder: Path
    world_size: int
    micro_batch_size: int
    steps: range
    killed: bool


def run_rank(start: Start, rank: int, log: Path) -> None:
    """Log a line for every step: numbers of its rows in the step, source, epoch, window and hash of the tokens."""
    stream = open_stream(start.folder)
    ahead = Prefetcher(
        lambda step: stream.micro_batches(
            step, rank=rank, world_size=start.world_size, micro_batch_size=start.micro_batch_size
        ),
        pin=False,
    )
    numbers = np.arange(BATCH).reshape(-1, start.world_size, start.micro_batch_size)[:, rank].ravel()
    with log.open("w", encoding="utf-8") as file:
        for step in start.steps:
            following = step + 1 if step + 1 in start.steps else None
            rows = [row for batch in ahead.take(step, following) for row in batch.numpy()]
            drawn = [column[numbers].tolist() for column in stream.draw(step)]
            hashes = [hashlib.sha256(row.tobytes()).hexdigest() for row in rows]
            file.write(json.dumps([step, list(zip(numbers.tolist(), *drawn, hashes, strict=True))]) + "\n")
            file.flush()
            time.sleep(PACE_S)
    ahead.close()
    while start.killed:
        time.sleep(1.0)
