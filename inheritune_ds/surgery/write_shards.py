"""Write the target's weights: shards of safetensors, filled straight from the files of the sources."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from inheritune_ds.console import Meter
from inheritune_ds.errors import StorageError, SurgeryError
from inheritune_ds.storage.files import storage_errors, write_json
from inheritune_ds.storage.safetensors import SafetensorsWriter
from inheritune_ds.surgery.compare import as_bytes
from inheritune_ds.surgery.weight_files import DTYPES, INDEX, SINGLE

if TYPE_CHECKING:
    from inheritune_ds.surgery.tensor_map import TensorCopy
    from inheritune_ds.surgery.tensor_values import TargetValues

SHARD_BYTES = 2 * 10**9


def write_shards(folder: Path, grafts: Sequence["TensorCopy"], values: "TargetValues") -> None:
    """Write tensors, in this order, in shards of at most `SHARD_BYTES` (a larger tensor has one to itself).

    The bytes go from file to file; nothing but fresh or converted tensors is held in memory.

    Raises:
        StorageError: If they do not fit on the disk, or cannot be written.
    """
    named = {graft.name: graft for graft in grafts}
    sizes = {name: values.sizes[name] for name in named}
    with Meter("writing the target", "MB", sum(sizes.values()) // 10**6) as meter:
        for path, names in _shards(folder, sizes):
            _write(path, [named[name] for name in names], values)
            meter.advance(sum(sizes[name] for name in names) // 10**6)


def write_stream(folder: Path, metas: Mapping[str, torch.Tensor], tensors: Iterator[torch.Tensor]) -> None:
    """Write tensors as they come, in the same shards as `write_shards`; one at a time is held in memory.

    `metas` has their types and shapes by name, in order, on the meta device.

    Raises:
        StorageError: If they do not fit on the disk.
        OSError: If they cannot be written.
    """
    sizes = {name: meta.nbytes for name, meta in metas.items()}
    for path, names in _shards(folder, sizes):
        header = {name: (DTYPES[metas[name].dtype], tuple(metas[name].shape), sizes[name]) for name in names}
        with SafetensorsWriter(path, header) as writer:
            for _ in names:
                writer.append(as_bytes(next(tensors)).data)


def _shards(folder: Path, sizes: Mapping[str, int]) -> Iterator[tuple[Path, list[str]]]:
    """Yield each file and the names of its tensors; check the space before, write the index of several files after."""
    check_space(folder, sum(sizes.values()))
    shards = shard_files(sizes)
    for file, names in shards.items():
        yield folder / file, names
    if len(shards) > 1:
        files = {name: file for file, names in shards.items() for name in names}
        metadata = {"total_size": sum(sizes.values())}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(files.items()))})


def shard_files(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Names of the tensors of each file, cut where a file would become larger than `SHARD_BYTES`."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    count = len(shards)
    numbered = ((f"model-{number:05d}-of-{count:05d}.safetensors", names) for number, names in enumerate(shards, 1))
    return dict(numbered) if count > 1 else {SINGLE: shards[0]}


def check_space(folder: Path, size: int) -> None:
    """Raise a StorageError if a target of `size` bytes does not fit on the disk."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise StorageError(
            f"{folder.parent}: the target takes {_in_words(size)}, but {_in_words(free)} are free",
            action="free some space, or choose another place, then rerun the same command",
        )


def _in_words(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 10**7 else f"{size / 1e6:.2f} MB"


def _write(path: Path, shard: Sequence["TensorCopy"], values: "TargetValues") -> None:
    """Write one safetensors file.

    safetensors' own writer takes tensors in memory; here the kernel copies their bytes from file to file, which is as
    fast as copying the files.
    """
    # Wider numbers first, as safetensors itself does: every tensor then begins at a multiple of its numbers' size.
    ordered = sorted(shard, key=lambda graft: -values.meta(graft).element_size())
    metas = {graft.name: values.meta(graft) for graft in ordered}
    tensors = {name: (DTYPES[meta.dtype], tuple(meta.shape), values.sizes[name]) for name, meta in metas.items()}
    with storage_errors(path), SafetensorsWriter(path, tensors) as writer:
        for graft in ordered:
            span = values.span(graft)
            if span is None:
                writer.append(as_bytes(values.of(graft)).data)
            elif not writer.copy(*span):
                raise SurgeryError(f"{span[0]} is cut short", action="copy or download the file again")
