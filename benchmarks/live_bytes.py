"""Bytes of all tensors that are alive, and their peak: the need of a caching allocator on a GPU."""

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


def live_tensors() -> list[torch.Tensor]:
    """Every tensor that Python knows and that has memory: those of the meta device have none."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return [tensor for tensor in found if not tensor.is_meta]


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    """Their storages by id, each once; as long as the result is kept, no id is given to another."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {id(storage): storage for storage in found}


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, counts each storage from its operator to its last reference; `tensors` count already."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self.now = 0
        for tensor in tensors:
            self._add(tensor)
        self.peak = self.now

    def _add(self, tensor: torch.Tensor) -> None:
        if tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        known = self._sizes.get(key)
        if known is not None and known[0]() is storage:
            self.now += size - known[1]  # it may have been resized
            self._sizes[key] = (known[0], size)
            return

        def forget(reference: "weakref.ref[torch.UntypedStorage]") -> None:
            kept = self._sizes.get(key)
            if kept is not None and kept[0] is reference:
                self.now -= kept[1]
                del self._sizes[key]

        self._sizes[key] = (weakref.ref(storage, forget), size)
        self.now += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._add, result)
        self.peak = max(self.peak, self.now)
        return result
