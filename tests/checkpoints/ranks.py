"""Several ranks as threads of one process that exchange values over a barrier; tests/campaign has process groups."""

import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from inheritune_ds.checkpoints.fragments import MASTER, key_of
from inheritune_ds.checkpoints.manifest import Checkpoint, find_fault
from inheritune_ds.checkpoints.saver import Saver, Value
from inheritune_ds.checkpoints.snapshot import PinnedBuffers, Snapshot
from inheritune_ds.checkpoints.store import CheckpointStore
from inheritune_ds.checkpoints.train_state import SavedLayout, TrainState
from inheritune_ds.config.reliability import Reliability
from inheritune_ds.distributed.coordination import ObjectGroup
from inheritune_ds.distributed.world import World
from inheritune_ds.errors import InherituneError

RANKS = 2
FILES = [(0, "rank-00000.safetensors"), (1, "rank-00001.safetensors")]
WEIGHTS = 300


class Barrier:
    """Shared by the groups of all ranks; exchanges values as pickle, as processes do."""

    def __init__(self, size: int) -> None:
        self.values: list[bytes] = [b""] * size
        self.meeting = threading.Barrier(size, timeout=20.0)


class ThreadGroup(ObjectGroup):
    def __init__(self, barrier: Barrier, rank: int) -> None:
        self._barrier, self._rank = barrier, rank
        self.closed = False

    def gather(self, value: Value) -> Sequence[Value]:
        self._barrier.values[self._rank] = pickle.dumps(value)
        self._barrier.meeting.wait()
        values = [pickle.loads(value) for value in self._barrier.values]
        self._barrier.meeting.wait()
        return values

    def broadcast(self, value: Value) -> Value:
        return self.gather(value)[0]

    def close(self) -> None:
        self.closed = True


class State:
    """A fake engine: one parameter, of which each rank owns WEIGHTS elements."""

    def __init__(self, rank: int, ranks: int = RANKS) -> None:
        self.rank, self.ranks, self.weights = rank, ranks, torch.zeros(WEIGHTS)
        self.loaded: Path | None = None

    def capture(self, buffers: PinnedBuffers | None) -> Snapshot:
        fragments = {key_of("w", MASTER, self.rank * WEIGHTS): self.weights}
        if buffers is not None:
            fragments = buffers.copy(fragments)
        return Snapshot(fragments, {"w": {"shape": [self.ranks * WEIGHTS], "step": None}}, {"counters": {}})

    def load(self, checkpoint: Checkpoint) -> Sequence[str]:
        self.loaded = checkpoint.path
        return [f"rank {self.rank} has loaded"]


class Ranks:
    def __init__(self, folder: Path, **reliability: Any) -> None:
        self.folder = folder
        self.barrier = Barrier(RANKS)
        self.groups = [ThreadGroup(self.barrier, rank) for rank in range(RANKS)]
        self.engines = [State(rank) for rank in range(RANKS)]
        self.store = CheckpointStore(folder, keep=2)
        self.savers = [
            Saver(
                self.store if rank == 0 else CheckpointStore(folder / "not for this rank", keep=1),
                layout=SavedLayout(RANKS, 1, "fp32"),
                world=World(rank, RANKS, rank, RANKS, "env"),
                reliability=Reliability(**reliability),
                fingerprints={"recipe": "abc"},
                group=self.groups[rank],
            )
            for rank in range(RANKS)
        ]

    def each(self, work: Callable[[Saver, State], Any]) -> list[Any]:
        """Call on all ranks together; their results or errors."""

        def attempt(rank: int) -> Any:
            try:
                return work(self.savers[rank], self.engines[rank])
            except InherituneError as error:
                return error

        with ThreadPoolExecutor(RANKS) as pool:
            return list(pool.map(attempt, range(RANKS)))

    def save(self, step: int) -> list[Any]:
        for engine in self.engines:
            engine.weights.fill_(step)
        return self.each(lambda saver, engine: saver.save(engine, state_at(step)))

    def wait(self) -> list[Any]:
        return self.each(lambda saver, _: saver.wait())

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


def state_at(step: int) -> TrainState:
    return TrainState(step=step, tokens=step * 64, skipped_steps=1, train_seconds=step * 0.1)


def weights_of(folder: Path, name: str) -> float:
    [values] = load_file(folder / name).values()
    assert torch.equal(values, values[:1].expand_as(values))
    return float(values[0])


def all_weights(folder: Path) -> set[float]:
    assert find_fault(folder) is None
    return {weights_of(folder, name) for _, name in FILES}
