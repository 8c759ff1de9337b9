"""Write the target's weights: shards of safetensors, filled straight from the mapped files of the sources."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from inheritune_ds.errors import StorageError
from inheritune_ds.files import storage_errors, write_json
from inheritune_ds.surgery.weights import INDEX, SINGLE

if TYPE_CHECKING:
    from inheritune_ds.surgery.grafts import Graft

SHARD_BYTES = 2 * 10**9
_TOLD_EVERY_S = 5.0
Values = Callable[["Graft"], torch.Tensor]


def write_shards(
    folder: Path, grafts: Sequence["Graft"], sizes: Mapping[str, int], value: Values, say: Callable[[str], None]
) -> dict[str, str]:
    """Write tensors in shards of at most `SHARD_BYTES` (a larger tensor has one to itself), with an index if many.

    The bytes go from the mapped source to the file; nothing but fresh or converted tensors is held in memory.

    Args:
        folder: Where the files go.
        grafts: What to write, in this order.
        sizes: Bytes of each, by name.
        value: Gives the tensor of a graft.
        say: Prints one line; progress every few seconds.

    Returns:
        Name of the file that holds each tensor.

    Raises:
        StorageError: If they do not fit on the disk, or cannot be written.
    """
    total = sum(sizes.values())
    check_space(folder, total)
    shards = list(_shards(grafts, sizes))
    files: dict[str, str] = {}
    done, told_s = 0, time.monotonic()
    start_s = told_s
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(folder / name, {graft.name: value(graft) for graft in shard})
        files |= {graft.name: name for graft in shard}
        done += sum(sizes[graft.name] for graft in shard)
        now_s = time.monotonic()
        if now_s - told_s > _TOLD_EVERY_S and done < total:
            told_s = now_s
            rate = done / (now_s - start_s)
            say(f"writing: {done / 1e9:.1f} of {total / 1e9:.1f} GB, {(total - done) / rate:.0f} s left")
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))})
    return files


def check_space(folder: Path, size: int) -> None:
    """Refuse to begin what cannot fit.

    Raises:
        StorageError: Naming both sizes.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise StorageError(
            f"{folder.parent}: the target takes {size / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free",
            action="free some space, or choose another place, then give the same command again",
        )


def _shards(grafts: Sequence["Graft"], sizes: Mapping[str, int]) -> Iterator[list["Graft"]]:
    shard: list[Graft] = []
    filled = 0
    for graft in grafts:
        if shard and filled + sizes[graft.name] > SHARD_BYTES:
            yield shard
            shard, filled = [], 0
        shard.append(graft)
        filled += sizes[graft.name]
    yield shard


def _write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    # safetensors' own save_file refuses tensors that share memory, as the two copies of a repeated block do.
    from safetensors import TensorSpec, serialize_file

    held = {name: tensor.contiguous() for name, tensor in tensors.items()}  # alive until the file is written
    specs = {
        name: TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=list(tensor.shape),
            data_ptr=tensor.data_ptr(),
            data_len=tensor.numel() * tensor.element_size(),
        )
        for name, tensor in held.items()
    }
    with storage_errors(path):
        path.touch()
        mode = path.stat().st_mode  # what the user's umask gives; safetensors lets nobody else read
        serialize_file(specs, str(path), metadata={"format": "pt"})
        path.chmod(mode)
