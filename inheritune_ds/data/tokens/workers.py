"""Processes that turn text into token ids, in order and with a bounded number of jobs under way.

Processes and not threads: the `tokenizers` library shares one cache among its threads, and turning ids into an array
holds Python's lock. Every thread of a pool has one process and a pipe to it. A `ProcessPoolExecutor` has one pipe for
the results of all its processes, and waits forever when one of them is killed while it sends. A process ends by itself
when this one is gone: its pipe is closed then.
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
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from inheritune_ds.data.tokens.encoder import TextEncoder
from inheritune_ds.errors import MachineError
from inheritune_ds.storage.redaction import redact_output

Ids = npt.NDArray[np.uint32]
JOBS_HERE = 8
"""Jobs that this process does itself before it starts workers: a small corpus is done by then."""


class _Worker(threading.local):
    """The process of a thread, started when the thread gets its first job."""

    process: SpawnProcess | None = None
    pipe: Connection


class EncoderPool:
    """Encodes lists of text pieces; use it as a context manager.

    Args:
        encoder: What encodes here.
        definition: Arguments with which workers build their own.
        workers: Processes; with 1 this process does all itself.
    """

    def __init__(self, encoder: TextEncoder, definition: tuple[str, int], workers: int) -> None:
        self._encoder, self._definition, self._count = encoder, definition, workers
        self._jobs = 0
        self._own = _Worker()
        self._processes: list[SpawnProcess] = []
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="encode")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.terminate()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.join()

    def encode(self, jobs: Iterable[list[str]]) -> Iterator[list[Ids]]:
        """Yield the ids of every job, in order; whoever stops early drops the jobs that are under way.

        Args:
            jobs: Lists of texts, each text encoded on its own; taken as the workers get along.

        Raises:
            MachineError: A worker has died.
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
            found: list[Ids] = self._own.pipe.recv()
        except (EOFError, OSError):
            process.join(timeout=1.0)
            raise MachineError(
                f"a process that tokenizes has ended by itself (exit code {process.exitcode})",
                action="look for an out-of-memory kill (dmesg), and give the same command again, with fewer --workers: "
                "finished shards are kept",
            ) from None
        return found

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
    """Encode what comes through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the process that started this one
    redact_output()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder = TextEncoder(*definition)
    while True:
        try:
            pieces = pipe.recv()
            pipe.send(encoder.encode(pieces))
        except (EOFError, OSError):
            return
