"""A rank of `test_elastic.py`: it reads steps ahead as the training loop does and logs every window it had.

The argument is a JSON object with the parameters of `run_rank`.
"""

import hashlib
import json
import sys
import time
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


def run_rank(folder: str, log: str, shares: dict[str, int], steps: tuple[int, int], *, killed: bool) -> None:
    """Log a line for every step: numbers of its rows in the step, source, epoch, window and hash of the tokens.

    `shares` are rank, world_size and micro_batch_size; a rank that is to be killed waits for it after its steps.
    """
    stream, planned = open_stream(Path(folder)), range(*steps)
    ahead = Prefetcher(lambda step: stream.micro_batches(step, **shares), pin=False)
    rows_of = np.arange(BATCH).reshape(-1, shares["world_size"], shares["micro_batch_size"])
    numbers = rows_of[:, shares["rank"]].ravel()
    with Path(log).open("w", encoding="utf-8") as file:
        for step in planned:
            following = step + 1 if step + 1 in planned else None
            rows = [row for batch in ahead.take(step, following) for row in batch.numpy()]
            drawn = [column[numbers].tolist() for column in stream.draw(step)]
            hashes = [hashlib.sha256(row.tobytes()).hexdigest() for row in rows]
            file.write(json.dumps([step, list(zip(numbers.tolist(), *drawn, hashes, strict=True))]) + "\n")
            file.flush()
            time.sleep(PACE_S)
    ahead.close()
    while killed:
        time.sleep(1.0)


if __name__ == "__main__":
    run_rank(**json.loads(sys.argv[1]))
