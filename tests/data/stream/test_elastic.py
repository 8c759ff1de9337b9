import hashlib
import json
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.data.stream import elastic_rank
from tests.data.stream.elastic_rank import BATCH, SEQ_LEN, SHARDS, open_stream
from tests.launching import ROOT, environment
from tests.warm_python import WarmProcess, WarmPython

STOPS, EPOCHS = 20, 8
MOST_STEPS = 20
"""Of a start that will be killed: however late the kill comes, steps are left for the next."""

Row = tuple[int, int, int, str]
"""Source, epoch, window and hash of the tokens."""


def write_tokens(folder: Path) -> dict[str, list[int]]:
    """Write the shards; every token of the run is another number."""
    tokens: dict[str, list[int]] = {}
    for number, (name, counts) in enumerate(SHARDS.items()):
        tokens[name] = list(range(1_000_000 * number, 1_000_000 * number + sum(counts)))
        parts = np.split(np.array(tokens[name], dtype="<u4"), np.cumsum(counts)[:-1])
        for shard, part in enumerate(parts):
            part.tofile(folder / f"{name}-{shard}.bin")
    return tokens


def start(warm: WarmPython, log: Path, shares: dict[str, int], steps: tuple[int, int], *, killed: bool) -> WarmProcess:
    given = {"folder": str(log.parent), "log": str(log), "shares": shares, "steps": steps, "killed": killed}
    with log.with_suffix(".out").open("w") as output:
        return warm.start([elastic_rank.__file__, json.dumps(given)], cwd=ROOT, env=environment(), stdout=output)


def wait_for_a_step(log: Path) -> None:
    deadline_s = time.monotonic() + 60
    while not (log.exists() and log.stat().st_size):
        assert time.monotonic() < deadline_s, "no rank has come to its first step"
        time.sleep(0.002)


def logged(log: Path) -> dict[int, dict[int, Row]]:
    """Rows of every step that a rank has finished, by their number in the step; a line cut by the kill is none."""
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    return {step: {number: (source, *rest) for number, source, *rest in rows} for step, rows in lines}


def commit(logs: list[Path], first: int) -> list[Row]:
    """Rows, in their global sequence, of the steps from `first` on that all ranks have finished."""
    parts = [logged(log) for log in logs]
    rows: list[Row] = []
    step = first
    while all(step in part for part in parts):
        numbered = [item for part in parts for item in part[step].items()]
        assert sorted(number for number, _ in numbered) == list(range(BATCH))
        rows += [row for _, row in sorted(numbered)]
        step += 1
    return rows


@pytest.mark.thorough
@pytest.mark.slow
def test_killed_and_resumed_runs_of_other_world_sizes_read_the_sequence_of_an_undisturbed_one(
    tmp_path: Path, warm: WarmPython
) -> None:
    tokens = write_tokens(tmp_path)
    stream = open_stream(tmp_path)
    total_steps = -(-EPOCHS * stream.num_windows // BATCH)
    draw = random.Random(5)
    read: list[Row] = []
    worlds: list[int] = []
    productive: set[int] = set()
    for number in range(STOPS + 1):
        first, last = len(read) // BATCH, number == STOPS
        world_size = draw.choice([size for size in (1, 2, 3, 4) if size not in worlds[-1:]])
        micro_batch_size = draw.choice([size for size in (1, 2, 3, 4) if BATCH % (world_size * size) == 0])
        steps = (first, total_steps if last else first + MOST_STEPS)
        logs = [tmp_path / f"{number}-{rank}.jsonl" for rank in range(world_size)]
        worlds.append(world_size)
        shares = {"world_size": world_size, "micro_batch_size": micro_batch_size}
        processes = [start(warm, log, shares | {"rank": rank}, steps, killed=not last) for rank, log in enumerate(logs)]
        if not last:
            # Every world size gets somewhere once; otherwise ranks may be killed before their first step.
            for log in [draw.choice(logs)] if world_size in productive else logs:
                wait_for_a_step(log)
            time.sleep(draw.uniform(0.0, 0.05))
            for process in draw.sample(processes, len(processes)):
                process.kill()
        assert {process.wait(timeout=60) for process in processes} == {0 if last else -signal.SIGKILL}
        rows = commit(logs, first)
        read += rows
        if rows:
            productive.add(world_size)
    assert productive == {1, 2, 3, 4}
    assert len(read) == total_steps * BATCH

    # What an undisturbed run has, its tokens taken from the lists that the shards were written from.
    names = list(SHARDS)
    undisturbed: list[Row] = []
    for step in range(total_steps):
        for source, epoch, window in zip(*(column.tolist() for column in stream.draw(step)), strict=True):
            row = tokens[names[source]][window * SEQ_LEN : window * SEQ_LEN + SEQ_LEN + 1]
            undisturbed.append(
                (source, epoch, window, hashlib.sha256(np.array(row, dtype="<i8").tobytes()).hexdigest())
            )
    assert read == undisturbed
    windows = [(number, window) for number, name in enumerate(names) for window in range((len(tokens[name]) - 1) // 16)]
    for epoch in range(EPOCHS):
        assert sorted((source, window) for source, when, window, _ in read if when == epoch) == windows
