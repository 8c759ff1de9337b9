"""Fragments: consecutive elements of a parameter, named by parameter, kind and first element; one file per rank.

`rank-00000.safetensors` holds flat tensors such as `model.norm.weight/fp32/0`, `.../exp_avg/0` and `.../exp_avg_sq/0`:
the fp32 master and both of Adam's moments. Another rank's file holds the elements that follow.
"""

import errno
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from inheritune_ds.errors import CheckpointError, StorageError, TrainingError
from inheritune_ds.storage.safetensors import SafetensorsWriter, read_header

MASTER = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (MASTER, *MOMENTS)
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_MODE = 0o644
"""Without write permission for other users under any umask: such a checkpoint would be refused."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DEFECT = "nothing was published, older checkpoints are kept; this is a defect, please report it"
_DAMAGED = "delete this checkpoint, then rerun the same command to resume from the one before"


def file_name(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def key_of(name: str, kind: str, start: int) -> str:
    """The name of a fragment: parameter, MASTER or one of MOMENTS, number of its first element."""
    return f"{name}/{kind}/{start}"


def write(fragments: Mapping[str, torch.Tensor], path: Path, *, needed_bytes: int) -> dict[str, Any]:
    """Write one rank's new file, flush it to the disk and hash it; tensors on a device are copied one at a time.

    The flat `fragments` are named by their `key_of`. Returns `bytes` and `blake3` (hex), as a manifest lists them.

    Raises:
        StorageError: With the path and `needed_bytes`, those of the whole checkpoint.
    """
    tensors = {key: (_DTYPES[value.dtype], tuple(value.shape), value.nbytes) for key, value in fragments.items()}
    try:
        with SafetensorsWriter(path, tensors, mode=_MODE) as writer:
            for value in fragments.values():
                writer.append(value.detach().cpu().view(torch.uint8).numpy().data)
            with ThreadPoolExecutor(1, thread_name_prefix="blake3") as hasher:
                digest = hasher.submit(blake3(max_threads=blake3.AUTO).update_mmap, path)
                writer.sync()
                return {"bytes": path.stat().st_size, "blake3": digest.result().hexdigest()}
    except OSError as error:
        action = "free some space" if error.errno in _FULL else "check the disk, or choose another folder"
        raise StorageError(
            f"{path} cannot be written: {error.strerror}; the checkpoint takes {needed_bytes:,} bytes",
            action=f"{action}, then rerun the same command to resume: older checkpoints are kept",
        ) from None


def check_coverage(folder: Path, world_size: int, parameters: Mapping[str, Mapping[str, Any]]) -> None:
    """Check by the files' headers that the fragments of every parameter and kind hold each element exactly once.

    `parameters` has `shape` and `step` of every parameter of the model; one without a step has no moments.

    Raises:
        TrainingError: If elements are missing or duplicate, or fragments belong to no parameter.
    """
    found = _find(folder, world_size)
    for name, parameter in parameters.items():
        numel = torch.Size(parameter["shape"]).numel()
        for kind in KINDS if parameter["step"] is not None else (MASTER,):
            at = 0
            for start, count, _ in found.pop((name, kind), []):
                if start != at:
                    raise _uncovered(folder, f"{name}/{kind}", min(start, at), max(start, at), twice=start < at)
                at += count
            if at != numel:
                raise _uncovered(folder, f"{name}/{kind}", min(numel, at), max(numel, at), twice=at > numel)
    if found:
        name, kind = next(iter(found))
        raise TrainingError(
            f"the fragments in {folder} hold {name}/{kind}, which the model does not have", action=_DEFECT
        )


def _uncovered(folder: Path, what: str, first: int, end: int, *, twice: bool) -> TrainingError:
    return TrainingError(
        f"the fragments in {folder} hold elements {first} to {end - 1} of {what} {'twice' if twice else 'nowhere'}",
        allowed="every element of every parameter exactly once",
        action=_DEFECT,
    )


def _find(folder: Path, world_size: int) -> dict[tuple[str, str], list[tuple[int, int, int]]]:
    """First element, number of elements and rank of all fragments by parameter and kind, in ascending order."""
    found = defaultdict(list)
    for rank in range(world_size):
        for key, entry in read_header(folder / file_name(rank)).items():
            name, kind, start = key.rsplit("/", 2)
            found[name, kind].append((int(start), entry.shape[0], rank))
    return {named: sorted(pieces) for named, pieces in found.items()}


class Fragments:
    """The fragments of all ranks of a verified checkpoint, in mapped files; raise a CheckpointError for damage."""

    def __init__(self, folder: Path, world_size: int) -> None:
        from safetensors import SafetensorError, safe_open

        self._folder = folder
        try:
            self._files: list[Any] = [safe_open(folder / file_name(rank), framework="pt") for rank in range(world_size)]
            self._found = _find(folder, world_size)
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"the fragments in {folder} cannot be read: {str(error).splitlines()[0]}", action=_DAMAGED
            ) from None

    def copy(self, name: str, kind: str, start: int, out: torch.Tensor) -> None:
        """Fill a flat tensor with a parameter's elements from `start` on; raise a CheckpointError if any is missing."""
        end, copied = start + out.numel(), 0
        for first, numel, rank in self._found.get((name, kind), []):
            begin, stop = max(start, first), min(end, first + numel)
            if begin < stop:
                values = self._files[rank].get_tensor(key_of(name, kind, first))
                out[begin - start : stop - start].copy_(values[begin - first : stop - first])
                copied += stop - begin
        if copied != out.numel():
            raise CheckpointError(
                f"{self._folder} lacks elements {start} to {end - 1} of {name}/{kind}", action=_DAMAGED
            )
