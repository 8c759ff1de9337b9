"""Agree between ranks: run work on rank 0 while the others wait, gather, broadcast.

`Coordinator` works before the training's process group exists, and for work of any length: ranks poll the launcher's
store. `ObjectGroup` and `agree` are collectives.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from inheritune_ds.distributed.signals import EXIT_INTERRUPTED, StopSignal
from inheritune_ds.distributed.world import World
from inheritune_ds.errors import InherituneError, MachineError, TrainingError

POLL_S = 0.2
READ_S = 10.0
"""Rank 0's longest wait for the other ranks to read its result; a dead rank never does."""
_START_TIMEOUT = timedelta(minutes=10)
"""The first rank's longest wait for the last one to start."""
_LATECOMERS_S = 5.0
"""The same for a rank that is asked to stop: all exit together if they can."""
_STOP_KEY = "inheritune_ds/asked"
"""Set by a rank that is asked to stop while rank 0 works."""
Value = TypeVar("Value")


def agree(flag: bool, device: torch.device) -> bool:  # noqa: FBT001 - a flag is all there is
    """Whether any rank has set its flag; all ranks must call it together, with the process group's device."""
    found = torch.tensor(float(flag), device=device)
    if dist.is_initialized():
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found > 0)


class ObjectGroup:
    """Exchanges picklable values over its own gloo group, so that a thread may wait in it; all ranks make one together.

    Each method raises RuntimeError when a rank has ended or does not answer in time.
    """

    def __init__(self, world: World, timeout_s: float) -> None:
        self._size = world.size
        if world.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def gather(self, value: Value) -> Sequence[Value]:
        """Every rank's value, on every rank."""
        values: list[Any] = [value] * self._size
        if self._size > 1:
            dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast(self, value: Value) -> Value:
        """Rank 0's value, on every rank."""
        box = [value]
        if self._size > 1:
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def close(self) -> None:
        """Leave the group."""
        if self._size > 1:
            dist.destroy_process_group(self._group)


class MainRankLeftError(InherituneError):
    """Rank 0 has ended the run: the other ranks exit with its problem and its exit code."""

    def __init__(self, problem: str, exit_code: int) -> None:
        super().__init__(f"rank 0 has ended the run: {problem}")
        self.exit_code = exit_code


class Coordinator:
    """Runs work on rank 0 while the other ranks wait; with several ranks, waits until each of them makes one.

    Raises:
        MachineError: If the ranks cannot reach each other.
        KeyboardInterrupt: If this rank was asked to stop, and the others do not start.
    """

    def __init__(self, world: World, stop: StopSignal) -> None:
        self._world, self._stop = world, stop
        self._calls = 0
        self._store = _wait_for_all(stop) if world.size > 1 else None

    def run_on_rank0(self, work: Callable[[], Value]) -> Value:
        """Run work on rank 0 and return its result, a JSON value, on every rank; all ranks must call it together.

        Raises:
            MainRankLeftError: On the other ranks, if `work` raised on rank 0, or rank 0 was interrupted or killed.
        """
        if self._store is None:
            return work()
        self._calls += 1
        key = f"inheritune_ds/{self._calls}"
        if not self._world.is_main:
            return self._result_of_rank0(self._store, key)  # type: ignore[no-any-return]
        try:
            with self._stopped_by_other_ranks(self._store):
                result = work()
        except BaseException as error:
            self._publish(self._store, key, {"left": _last_words(error)})
            raise
        self._publish(self._store, key, {"answer": result})
        return result

    def combine(self, value: Any, work: Callable[[list[Any]], Value]) -> Value:
        """Run work on rank 0 with every rank's JSON value, by rank; all ranks must call it together.

        Returns and raises as `run_on_rank0` does.
        """
        if self._store is None:
            return work([value])
        store, prefix = self._store, f"inheritune_ds/{self._calls + 1}/rank"
        store.set(f"{prefix}{self._world.rank}", json.dumps(value))

        def gathered() -> Value:
            keys = [f"{prefix}{rank}" for rank in range(self._world.size)]
            while not store.check(keys):
                time.sleep(POLL_S)
            return work([json.loads(store.get(key)) for key in keys])

        return self.run_on_rank0(gathered)

    def _publish(self, store: Store, key: str, document: dict[str, Any]) -> None:
        """Store a document and wait until it is read, since the store may end with this process."""
        store.set(key, json.dumps(document))
        deadline_s = time.monotonic() + READ_S
        while store.add(f"{key}/read", 0) < self._world.size - 1 and time.monotonic() < deadline_s:
            time.sleep(POLL_S)

    @contextmanager
    def _stopped_by_other_ranks(self, store: Store) -> Iterator[None]:
        """Pass on another rank's request to stop, from a thread, while this rank works."""
        done = threading.Event()

        def listen() -> None:
            try:
                while not store.check([_STOP_KEY]):
                    if done.wait(POLL_S):
                        return
                self._stop.pass_on(store.get(_STOP_KEY).decode())
            except dist.DistError:
                return  # the launcher has ended, and ends this process, too

        threading.Thread(target=listen, name="requests of other ranks", daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def _result_of_rank0(self, store: Store, key: str) -> Any:
        asked = False
        try:
            while not store.check([key]):
                if self._stop.requested is not None and not asked:
                    asked = True
                    store.set(_STOP_KEY, f"{self._stop.requested} on rank {self._world.rank}")
                time.sleep(POLL_S)
            document = json.loads(store.get(key))
            store.add(f"{key}/read", 1)
        except dist.DistError:
            raise MainRankLeftError("it was killed", TrainingError.exit_code) from None
        if "left" in document:
            raise MainRankLeftError(*document["left"])
        return document["answer"]


def _last_words(error: BaseException) -> tuple[str, int]:
    if isinstance(error, InherituneError):
        return error.problem, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted", EXIT_INTERRUPTED
    return f"{type(error).__name__}: {error}", 1


def _wait_for_all(stop: StopSignal) -> Store:
    """Open the store on a thread: its constructor waits in C++ code, where Python handles no signal."""
    opened: Future[Store] = Future()

    def open_it() -> None:
        try:
            opened.set_result(open_store())
        except Exception as error:  # noqa: BLE001 (raised again by `result`)
            opened.set_exception(error)

    threading.Thread(target=open_it, name="store", daemon=True).start()
    deadline_s = float("inf")
    while not wait([opened], timeout=POLL_S).done:
        if stop.requested is not None:
            deadline_s = min(deadline_s, time.monotonic() + _LATECOMERS_S)
        if time.monotonic() > deadline_s:
            raise KeyboardInterrupt
    return opened.result()


def open_store() -> Store:
    """Open the launcher's store at MASTER_ADDR:MASTER_PORT; a process group made later shares it.

    Raises:
        MachineError: If the ranks cannot meet there.
    """
    try:
        return next(rendezvous("env://", timeout=_START_TIMEOUT))[0]  # type: ignore[no-any-return]
    except dist.DistError as error:
        raise cannot_meet(error) from None


def cannot_meet(error: RuntimeError) -> MachineError:
    """The error of ranks that cannot meet."""
    return MachineError(
        f"the ranks cannot meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: "
        f"{str(error).splitlines()[0]}",
        allowed="a free port that every rank reaches",
        action="if another run uses the port, choose one: deepspeed --master_port 29501 ... "
        "(torchrun: --master_port; srun: export MASTER_PORT)",
    )
