"""Write the target's weights: shards of safetensors, filled straight from the files of the sources."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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


def write_shards(folder: Path, grafts: Sequence["TensorCopy"], values: "TargetValues") -> dict[str, str]:
    """Write tensors in shards of at most `SHARD_BYTES` (a larger tensor has one to itself), with an index if many.

    The bytes go from file to file; nothing but fresh or converted tensors is held in memory.

    Args:
        folder: Where the files go.
        grafts: What to write, in this order.
        values: Of these grafts.

    Returns:
        Name of the file that holds each tensor.

    Raises:
        StorageError: If they do not fit on the disk, or cannot be written.
    """
    sizes = values.sizes
    total = sum(sizes[graft.name] for graft in grafts)
    check_space(folder, total)
    shards = list(_shards(grafts, sizes))
    files: dict[str, str] = {}
    with Meter("writing the target", "MB", total // 10**6) as meter:
        for number, shard in enumerate(shards, 1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _write(folder / name, shard, values)
            files |= {graft.name: name for graft in shard}
            meter.advance(sum(sizes[graft.name] for graft in shard) // 10**6)
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
            f"{folder.parent}: the target takes {_in_words(size)}, but {_in_words(free)} are free",
            action="free some space, or choose another place, then give the same command again",
        )


def _in_words(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 10**7 else f"{size / 1e6:.2f} MB"


def _shards(grafts: Sequence["TensorCopy"], sizes: Mapping[str, int]) -> Iterator[list["TensorCopy"]]:
    shard: list[TensorCopy] = []
    filled = 0
    for graft in grafts:
        if shard and filled + sizes[graft.name] > SHARD_BYTES:
            yield shard
            shard, filled = [], 0
        shard.append(graft)
        filled += sizes[graft.name]
    yield shard


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
            elif not writer.copy(span.path, span.offset, span.size):
                raise SurgeryError(f"{span.path} is cut short", action="bring the file again")
