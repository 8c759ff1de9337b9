"""Compare the tensors of a target with those of its sources, byte by byte."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from inheritune_ds.console import Meter
from inheritune_ds.errors import SurgeryError
from inheritune_ds.surgery.weight_files import WeightFiles

if TYPE_CHECKING:
    from inheritune_ds.surgery.tensor_map import TensorCopy

_CHUNK_BYTES = 1 << 24
_WORKERS = 2  # hashlib and numpy release the GIL


def describe_tensors(
    folder: Path, grafts: Sequence["TensorCopy"], value: Callable[["TensorCopy"], torch.Tensor]
) -> list[dict[str, Any]]:
    """Read every tensor in `folder` back and compare it with its `value` bit for bit; return the report's entries.

    Raises:
        SurgeryError: If a tensor on the disk differs from the expected one, or holds a non-finite number.
    """
    written = WeightFiles(folder, str(folder))
    described: list[dict[str, Any]] = []
    with Meter("comparing the target", "tensors", len(grafts)) as meter, ThreadPoolExecutor(_WORKERS) as pool:
        hashes = pool.map(lambda graft: _compare(written.tensor(graft.name), value(graft), graft), grafts)
        for graft, digest in zip(grafts, hashes, strict=True):
            described.append(_describe(graft, written, digest))
            meter.advance(1)
    return described


def _compare(written: torch.Tensor, meant: torch.Tensor, graft: "TensorCopy") -> str:
    """Hash a written tensor (hex) while comparing it with the expected one, chunk by chunk."""
    if written.dtype != meant.dtype or written.shape != meant.shape:
        raise _differs(graft)
    digest = hashlib.sha256()
    ours, theirs = as_bytes(written), as_bytes(meant)
    for start in range(0, len(ours), _CHUNK_BYTES):
        piece = ours[start : start + _CHUNK_BYTES]
        digest.update(piece.data)
        if not np.array_equal(piece, theirs[start : start + _CHUNK_BYTES]):
            raise _differs(graft)
    if written.is_floating_point():
        rows = written.reshape(-1)
        step = _CHUNK_BYTES // written.element_size()
        if not all(bool(torch.isfinite(rows[at : at + step]).all()) for at in range(0, len(rows), step)):
            raise SurgeryError(
                f"{graft.source_name or graft.name} of the {graft.source.role if graft.source else 'target'} holds a "
                "non-finite number",
                action="copy or download the weights again: they are damaged, or their training diverged",
            )
    return digest.hexdigest()


def _differs(graft: "TensorCopy") -> SurgeryError:
    return SurgeryError(
        f"{graft.name} was not written as it was read", action="check the disk, then rerun the same command"
    )


def as_bytes(tensor: torch.Tensor) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Bytes of a tensor, without a copy if it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, dtype=np.uint8)


def _describe(graft: "TensorCopy", written: WeightFiles, digest: str) -> dict[str, Any]:
    tensor = written.tensor(graft.name)
    source = None
    if graft.source is not None:
        source = {
            "model": graft.source.role,
            "tensor": graft.source_name,
            "block": graft.source_block,
            "file": graft.source.files.file_of[graft.source_name],
        }
    return {
        "name": graft.name,
        "block": graft.block,
        "part": graft.part,
        "inherited": source is not None,
        "source": source,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "sha256": digest,
    }


def tensor_sha256(tensor: torch.Tensor) -> str:
    """sha256 of the bytes of a tensor (hex)."""
    return hashlib.sha256(as_bytes(tensor.cpu()).data).hexdigest()


def weights_sha256(state: Mapping[str, torch.Tensor], hashes: Mapping[str, str] | None = None) -> str:
    """sha256 of a state dict (hex): names, dtypes, shapes and `hashes` (`tensor_sha256`), in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name} {state[name].dtype} {tuple(state[name].shape)} ".encode())
        digest.update((hashes[name] if hashes is not None else tensor_sha256(state[name])).encode())
    return digest.hexdigest()
