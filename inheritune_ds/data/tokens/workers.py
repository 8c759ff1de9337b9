"""Encodes text in several processes, in order and with a bounded number of pending jobs.

Processes instead of threads: the `tokenizers` library shares one cache among its threads, and converting ids to an
array holds Python's lock. Every thread of a pool has one process and its own pipe: a `ProcessPoolExecutor` has one pipe
for all results, and waits forever if a process is killed while it sends. A process ends when its pipe is closed.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Self, cast

from inheritune_ds.console import own_screen
from inheritune_ds.data.tokens.encoder import Ids, TextEncoder
from inheritune_ds.errors import MachineError
from inheritune_ds.storage.redaction import redact

JOBS_HERE = 8
"""First jobs, which this process does itself: a small corpus needs no workers."""


class _Worker(threading.local):
    """The process of a thread, started with its first job."""

    process: SpawnProcess | None = None
    pipe: Connection


class EncoderPool:
    """Encodes lists of text pieces; use it as a context manager. With one worker, only this process encodes."""

    def __init__(self, encoder: TextEncoder, definition: tuple[str, int], workers: int) -> None:
        self._encoder, self._definition, self._count = encoder, definition, workers
        self._jobs = 0
        self._own = _Worker()
        self._processes: list[SpawnProcess] = []
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="encode")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.join()

    def encode(self, jobs: Iterable[list[str]]) -> Iterator[list[Ids]]:
        """Yield the ids of every job, a list of texts, in order; closing the iterator cancels pending jobs.

        Raises a MachineError if a worker has died.
        """
        waiting: deque[Future[list[Ids]]] = deque()
        try:
            for pieces in jobs:
                self._jobs += 1
                if self._count == 1 or self._jobs <= JOBS_HERE:
                    yield self._encoder.encode(pieces)
                    continue
                waiting.append(self._threads.submit(self._ask, pieces))
                while len(waiting) > 2 * self._count or (waiting and waiting[0].done()):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for job in waiting:
                job.cancel()

    def _ask(self, pieces: list[str]) -> list[Ids]:
        process = self._own.process or self._start()
        try:
            self._own.pipe.send(pieces)
            return cast("list[Ids]", self._own.pipe.recv())
        except (EOFError, OSError):
            process.join(timeout=1.0)
            raise MachineError(
                f"a tokenizer worker process died (exit code {process.exitcode})",
                action="look for an out-of-memory kill (dmesg), and rerun the same command with fewer --workers: "
                "finished shards are kept",
            ) from None

    def _start(self) -> SpawnProcess:
        context = multiprocessing.get_context("spawn")
        self._own.pipe, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self._definition), daemon=True)
        process.start()
        theirs.close()
        self._own.process = process
        self._processes.append(process)
        return process


def _work(pipe: Connection, definition: tuple[str, int]) -> None:
    """Encode the texts from the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the parent process handles Ctrl-C
    own_screen(redact)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder = TextEncoder(*definition)
    while True:
        try:
            pieces = pipe.recv()
            pipe.send(encoder.encode(pieces))
        except (EOFError, OSError):
            return
