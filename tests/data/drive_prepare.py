"""Runs `inheritune-ds prepare` so that it can be killed at any moment.

The argument is a JSON object: `arguments` of the command line, `die_at` (the step at which the process kills itself
with SIGKILL; null: never), `marks` (file of two int64: steps taken, tokens written). A step is a change of a file (from
Python's audit events), a document written, or a commit of the journal, counted before and after.
"""

import functools
import json
import mmap
import os
import signal
import struct
import sys
from pathlib import Path
from typing import Any

SHARD_TOKENS = 6000
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "sqlite3.connect"}


class Marks:
    """Counters in a file, which outlive the process."""

    def __init__(self, path: str, die_at: int | None) -> None:
        with Path(path).open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 16)
        self._die_at, self._steps, self._tokens = die_at, 0, 0

    def step(self, tokens: int = 0) -> None:
        self._steps, self._tokens = self._steps + 1, self._tokens + tokens
        self._memory[:16] = struct.pack("<qq", self._steps, self._tokens)
        if self._steps == self._die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook."""
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or writes:
            self.step()


def run(order: dict[str, Any]) -> int:
    """Be the command."""
    from inheritune_ds.cli import main
    from inheritune_ds.data.tokens import journal, prepare, shards, workers, writer

    marks = Marks(order["marks"], order["die_at"])
    append, commit = shards.ShardWriter.append, journal.Journal.commit

    def counted_append(self: shards.ShardWriter, ids: Any) -> bool:
        closed = append(self, ids)
        marks.step(len(ids))
        return closed

    def counted_commit(self: journal.Journal, state: dict[str, Any]) -> None:
        marks.step()
        commit(self, state)
        marks.step()

    shards.ShardWriter.append = counted_append  # type: ignore[method-assign]
    journal.Journal.commit = counted_commit  # type: ignore[method-assign]
    writer.JOB_CHARACTERS, workers.JOBS_HERE = 20_000, 1
    prepare.prepare = functools.partial(prepare.prepare, shard_tokens=SHARD_TOKENS)
    sys.addaudithook(marks.watch)
    return main(order["arguments"])


if __name__ == "__main__":
    sys.exit(run(json.loads(sys.argv[1])))
