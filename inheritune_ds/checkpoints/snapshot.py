"""What DeepSpeed would write of a rank, taken from it before anything is written.

`save_checkpoint` hands each file's content to a checkpoint engine; the one here keeps it. So DeepSpeed's collectives
are over before the first byte is written, and no refusal of the disk keeps a rank from a barrier that others wait at.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from inheritune_ds.checkpoints.shard_reader import pickle_stage_by_value

TAG = "engine"
"""The folder of DeepSpeed's files inside a checkpoint."""


@dataclass
class CapturedState:
    """A rank's share of a checkpoint.

    Attributes:
        shards: What each file is to hold, by its path inside the checkpoint.
        failure: Why it could not be copied to host memory; the shards are not complete then.
    """

    shards: dict[str, Any] = field(default_factory=dict)
    failure: Exception | None = None

    @property
    def bytes(self) -> int:
        """Of all tensors; one that several names share counts once, as it is written once."""
        return sum(
            storage.nbytes()
            for shard in self.shards.values()
            for storage in {_key(t.untyped_storage()): t.untyped_storage() for t in _tensors(shard)}.values()
        )


class PinnedBuffers:
    """Copies of a rank's state in host memory, which is kept from one save to the next; page-locked beside a GPU."""

    def __init__(self) -> None:
        self._buffers: list[torch.UntypedStorage] = []
        self._free: list[torch.UntypedStorage] = []

    def recycle(self) -> None:
        """Make all buffers free again: what was copied before is not needed any more."""
        self._free = list(self._buffers)

    def copy(self, state: Any) -> Any:
        """A copy that shares nothing with `state`; tensors that share memory share it in the copy, too.

        `wait` must follow before the copy is read.
        """
        storages: dict[tuple[str, int, int], torch.UntypedStorage] = {}
        memo: dict[int, Any] = {}
        for tensor in _tensors(state):
            own = tensor.untyped_storage()
            key = _key(own)
            if key not in storages:
                storages[key] = self._buffer(own)
                storages[key].copy_(own, non_blocking=True)
            view = torch.empty(0, dtype=tensor.dtype)
            memo[id(tensor)] = view.set_(storages[key], tensor.storage_offset(), tensor.size(), tensor.stride())
        return copy.deepcopy(state, memo)

    @staticmethod
    def wait() -> None:
        """Wait until the device has handed everything over."""
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def _buffer(self, like: torch.UntypedStorage) -> torch.UntypedStorage:
        pinned = like.device.type == "cuda"
        for number, buffer in enumerate(self._free):
            if buffer.nbytes() == like.nbytes():
                return self._free.pop(number)
        made = torch.empty(like.nbytes(), dtype=torch.uint8, pin_memory=pinned).untyped_storage()
        self._buffers.append(made)
        return made


def capture(engine: Any, client_state: Mapping[str, Any], copies: PinnedBuffers | None) -> CapturedState:
    """Take from a DeepSpeed engine what it would save; all ranks must call it.

    Args:
        engine: DeepSpeed's.
        client_state: What to save beside it.
        copies: Where to copy the tensors, so that training may go on. None: the shards refer to the engine's own
            tensors, and must be written before the next step.
    """
    pickle_stage_by_value()
    taker = _Taker(copies)
    own, engine.checkpoint_engine = engine.checkpoint_engine, taker
    # It would copy two of its scripts beside the state: code, which nobody should run out of a checkpoint.
    vars(engine)["_copy_recovery_script"] = lambda _: None
    try:
        engine.save_checkpoint(os.curdir, tag=TAG, client_state=dict(client_state), save_latest=False)
    finally:
        del vars(engine)["_copy_recovery_script"]
        engine.checkpoint_engine = own
    if copies is not None:
        copies.wait()
    return taker.captured


class _Taker:
    """DeepSpeed's interface of a checkpoint engine (deepspeed.runtime.checkpoint_engine), as far as a save needs it."""

    def __init__(self, copies: PinnedBuffers | None) -> None:
        self._copies = copies
        if copies is not None:
            copies.recycle()
        self.captured = CapturedState()

    def save(self, state_dict: Any, path: str) -> None:
        if self.captured.failure is not None:
            return
        try:
            held = state_dict if self._copies is None else self._copies.copy(state_dict)
        except (MemoryError, RuntimeError) as error:  # no host memory: not here, where the other ranks wait
            self.captured.failure = error
            return
        self.captured.shards[os.path.normpath(path)] = held

    def makedirs(self, path: str, *, exist_ok: bool) -> None:
        """Nothing is written yet."""

    def create(self, info: Any) -> None:
        """Nothing is written yet."""

    def commit(self, info: Any) -> None:
        """Nothing is written yet."""

    def is_decoupled(self) -> bool:
        return False

    def preserves_storage_sharing(self) -> bool:
        return False


def _key(storage: torch.UntypedStorage) -> tuple[str, int, int]:
    return str(storage.device), storage.data_ptr(), storage.nbytes()


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested dicts, lists and tuples."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)
