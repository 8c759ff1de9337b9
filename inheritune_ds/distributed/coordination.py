"""Agree between ranks: run work on rank 0 while the others wait, gather, broadcast."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from inheritune_ds.checkpoints.train_state import Requests
from inheritune_ds.distributed.signals import EXIT_INTERRUPTED, StopSignal
from inheritune_ds.distributed.world import World
from inheritune_ds.errors import InherituneError, MachineError, TrainingError


def agree(wishes: Requests, device: torch.device) -> Requests:
    """Make any rank's wish everybody's; all ranks must call it together.

    Args:
        wishes: Of this rank.
        device: Where the process group communicates.
    """
    asked = torch.tensor([wishes.stop, wishes.save, wishes.evaluate], dtype=torch.float32, device=device)
    if dist.is_initialized():
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
    stop, save, evaluate = (asked > 0).tolist()
    return Requests(stop, save, evaluate)


Value = TypeVar("Value")


class Circle(Protocol):
    """How ranks speak of a save. Each raises RuntimeError when a rank has gone."""

    def gather(self, value: Value) -> Sequence[Value]:
        """Every rank's value, on every rank."""

    def tell(self, value: Value) -> Value:
        """Rank 0's value, on every rank."""

    def close(self) -> None:
        """Nothing more will be said."""


class _Alone:
    """The circle of one rank."""

    def gather(self, value: Value) -> Sequence[Value]:
        return [value]

    def tell(self, value: Value) -> Value:
        return value

    def close(self) -> None:
        """Nobody was told anything."""


class _GlooCircle:
    """The circle of several: a process group beside the training's, so that a thread may wait in it."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self._size = size
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def gather(self, value: Value) -> Sequence[Value]:
        values: list[Any] = [None] * self._size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def tell(self, value: Value) -> Value:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def close(self) -> None:
        dist.destroy_process_group(self._group)


def make_circle(world: World, timeout_s: float) -> Circle:
    """The circle of this launch; all ranks call it together.

    Args:
        world: This rank among all.
        timeout_s: How long a rank waits for another.
    """
    return _Alone() if world.size == 1 else _GlooCircle(world.size, timeout_s)


POLL_S = 0.2
ATTENTION_S = 10.0
"""How long rank 0 waits until all have read its note; one that has died must not hold it."""
_MEETING_TIMEOUT = timedelta(minutes=10)
"""How long the first rank waits for the last one to start."""
_LATECOMERS_S = 5.0
"""How long a rank that is asked to stop waits for the last one to start, so that all leave together."""
_ASKED = "inheritune_ds/asked"
"""Note of a rank that was asked to stop while rank 0 works."""
Answer = TypeVar("Answer")


class Store(Protocol):
    """What is needed of torch's store."""

    def set(self, key: str, value: str, /) -> None:
        """Leave a note."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all these notes are there."""

    def get(self, key: str, /) -> bytes:
        """Read a note."""

    def add(self, key: str, amount: int, /) -> int:
        """Count up, from 0; return the count."""


class MainRankLeftError(InherituneError):
    """Rank 0 has ended the run: the other ranks leave with its words and its exit code.

    Args:
        problem: What rank 0 said.
        exit_code: The code that rank 0 leaves with.
    """

    def __init__(self, problem: str, exit_code: int) -> None:
        super().__init__(f"rank 0 has ended the run: {problem}")
        self.exit_code = exit_code


class Meeting:
    """Work that rank 0 does for all.

    Args:
        world: This rank among all. With several, making a Meeting waits until each of them makes one.
        stop: Signals of this rank.

    Raises:
        MachineError: If the ranks cannot meet.
        KeyboardInterrupt: If this rank was asked to stop, and the others do not come.
    """

    def __init__(self, world: World, stop: StopSignal) -> None:
        self._world, self._stop = world, stop
        self._notes = 0
        self._store = _wait_for_all(stop) if world.size > 1 else None

    def run_on_rank0(self, work: Callable[[], Answer]) -> Answer:
        """Let rank 0 do something; all ranks must call it together.

        Args:
            work: Called on rank 0 only. What it returns must survive JSON.

        Returns:
            What `work` returned, on every rank.

        Raises:
            MainRankLeftError: On the other ranks, if rank 0 has failed, was interrupted or was killed; on rank 0
                whatever `work` raised.
        """
        if self._store is None:
            return work()
        self._notes += 1
        key = f"inheritune_ds/{self._notes}"
        if self._world.is_main:
            return self._do(self._store, key, work)
        answer: Answer = self._wait(self._store, key)
        return answer

    def _do(self, store: Store, key: str, work: Callable[[], Answer]) -> Answer:
        try:
            with self._hearing(store):
                answer = work()
        except BaseException as error:
            self._tell(store, key, {"left": _last_words(error)})
            raise
        self._tell(store, key, {"answer": answer})
        return answer

    def _tell(self, store: Store, key: str, note: dict[str, Any]) -> None:
        """Leave a note and wait until it is read: the store may end with this process."""
        store.set(key, json.dumps(note))
        deadline_s = time.monotonic() + ATTENTION_S
        while store.add(f"{key}/read", 0) < self._world.size - 1 and time.monotonic() < deadline_s:
            time.sleep(POLL_S)

    @contextmanager
    def _hearing(self, store: Store) -> Iterator[None]:
        """Take over another rank's wish to stop, on a thread: this one works."""
        done = threading.Event()

        def listen() -> None:
            try:
                while not store.check([_ASKED]):
                    if done.wait(POLL_S):
                        return
                self._stop.pass_on(store.get(_ASKED).decode())
            except dist.DistError:
                return  # the launcher has gone: whoever ended it ends this process, too

        listener = threading.Thread(target=listen, name="wishes of other ranks", daemon=True)
        listener.start()
        try:
            yield
        finally:
            done.set()

    def _wait(self, store: Store, key: str) -> Any:
        asked = False
        try:
            while not store.check([key]):
                if self._stop.requested is not None and not asked:
                    asked = True
                    store.set(_ASKED, f"{self._stop.requested} on rank {self._world.rank}")
                time.sleep(POLL_S)
            note = json.loads(store.get(key))
            store.add(f"{key}/read", 1)
        except dist.DistError:
            raise MainRankLeftError("it has left without a word, so it was killed", TrainingError.exit_code) from None
        if "left" in note:
            raise MainRankLeftError(*note["left"])
        return note["answer"]


def _last_words(error: BaseException) -> tuple[str, int]:
    if isinstance(error, InherituneError):
        return error.problem, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted", EXIT_INTERRUPTED
    return f"{type(error).__name__}: {error}", 1


def _wait_for_all(stop: StopSignal) -> Store:
    """Open the store on a thread: its constructor waits in C++ code, where no signal is heard."""
    opened: list[Store] = []
    failed: list[Exception] = []

    def meet() -> None:
        try:
            opened.append(open_store())
        except Exception as error:  # noqa: BLE001 (raised again where it can be heard)
            failed.append(error)

    thread = threading.Thread(target=meet, name="meeting", daemon=True)
    thread.start()
    asked_s: float | None = None
    while thread.is_alive():
        thread.join(POLL_S)
        if stop.requested is not None:
            asked_s = time.monotonic() if asked_s is None else asked_s
            if time.monotonic() - asked_s > _LATECOMERS_S:
                raise KeyboardInterrupt
    if failed:
        raise failed[0]
    return opened[0]


def open_store() -> Store:
    """Open the launcher's store at MASTER_ADDR:MASTER_PORT; a process group made later shares it.

    Raises:
        MachineError: If the ranks cannot meet there.
    """
    try:
        store: Store = next(rendezvous("env://", timeout=_MEETING_TIMEOUT))[0]
    except dist.DistError as error:
        raise cannot_meet(error) from None
    return store


def cannot_meet(error: RuntimeError) -> MachineError:
    """Say where the ranks cannot meet, and what may help."""
    return MachineError(
        f"the ranks cannot meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: "
        f"{str(error).splitlines()[0]}",
        allowed="a free port that every rank reaches",
        action="if another run uses the port, choose one: deepspeed --master_port 29501 ... "
        "(torchrun: --master_port; srun: export MASTER_PORT)",
    )
