"""Processes that turn text into token ids, in order and with a bounded number of jobs on the way.

Processes and not threads: the `tokenizers` library shares one cache among its threads, and turning ids into an array
holds Python's lock. A worker ends by itself when this process is gone, however it went: its pipe is closed then.
"""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from queue import SimpleQueue
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from inheritune_ds.data.tokens.encoder import TextEncoder
from inheritune_ds.errors import MachineError
from inheritune_ds.storage.redaction import redact_output

Ids = npt.NDArray[np.uint32]
JOBS_HERE = 8
"""Jobs that this process does itself before it starts workers: a small corpus is done by then."""


class _Worker(NamedTuple):
    process: Any
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
        self._workers: list[_Worker] = []
        self._free: SimpleQueue[_Worker] = SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[list[Ids]]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def submit(self, pieces: list[str]) -> Iterator[list[Ids]]:
        """Hand in a job; yields the ids of earlier jobs that have to be taken first.

        Args:
            pieces: Texts, each encoded on its own.

        Raises:
            MachineError: A worker has died.
        """
        self._jobs += 1
        if self._count == 1 or self._jobs <= JOBS_HERE:
            done: Future[list[Ids]] = Future()
            done.set_result(self._encoder.encode(pieces))
            self._waiting.append(done)
        else:
            if self._threads is None:
                self._start()
            assert self._threads is not None
            self._waiting.append(self._threads.submit(self._ask, pieces))
        while len(self._waiting) > 2 * self._count or (self._waiting and self._waiting[0].done()):
            yield self._waiting.popleft().result()

    def drain(self) -> Iterator[list[Ids]]:
        """Yield the ids of all jobs that are still under way."""
        while self._waiting:
            yield self._waiting.popleft().result()

    def forget(self) -> None:
        """Drop the jobs that are under way."""
        for job in self._waiting:
            if not job.cancel():
                job.result()
        self._waiting.clear()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for _ in range(self._count):
            own, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, self._definition), daemon=True)
            process.start()
            theirs.close()
            worker = _Worker(process, own)
            self._workers.append(worker)
            self._free.put(worker)
        self._threads = ThreadPoolExecutor(self._count, thread_name_prefix="encode")

    def _ask(self, pieces: list[str]) -> list[Ids]:
        worker = self._free.get()
        try:
            worker.pipe.send(pieces)
            found: list[Ids] = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join(timeout=1.0)
            raise MachineError(
                f"a process that tokenizes has ended by itself (exit code {worker.process.exitcode})",
                action="look for an out-of-memory kill (dmesg), and give the same command again, with fewer --workers: "
                "finished shards are kept",
            ) from None
        finally:
            self._free.put(worker)  # a dead one too: else a thread that waits for one would wait for ever
        return found


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
