"""safetensors files written a tensor at a time, and their headers.

The format (huggingface/safetensors, README): the length of the header in 8 bytes, the header in JSON, padded with
spaces to whole 8 bytes, then the tensors without gaps. Torch is not imported here.
"""

import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

_COPY_BYTES = 1 << 26
_MAX_HEADER_BYTES = 100 * 10**6
"""The limit of safetensors itself."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        dtype: As safetensors names it, such as F32.
        shape: Of the tensor.
        start: Offset of its first byte in the file.
        nbytes: Bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class SafetensorsWriter:
    """Writes one safetensors file, whose tensors are handed over one after the other.

    Args:
        path: A file that does not exist yet.
        tensors: dtype (as safetensors names it), shape and bytes of each tensor by name, in the order of the file.

    Raises:
        OSError: If the disk refuses; so do all methods.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, (dtype, shape, nbytes) in tensors.items():
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
            at += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        # Others cannot write to it, whatever the umask: such a checkpoint would not be loaded again.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._stream = io.FileIO(descriptor, "w")
        try:
            self.append(memoryview(len(text).to_bytes(8, "little") + text))
        except OSError:
            self._stream.close()
            raise

    def append(self, data: memoryview) -> None:
        """Write the bytes of the next tensor."""
        data, at = data.cast("B"), 0
        while at < len(data):
            at += os.write(self._stream.fileno(), data[at : at + _COPY_BYTES])

    def copy(self, source: Path, offset: int, nbytes: int) -> bool:
        """Let the kernel copy the bytes of the next tensor from another file; False if that file is too short."""
        end = offset + nbytes
        with source.open("rb") as stream:
            while offset < end:
                copied = os.sendfile(self._stream.fileno(), stream.fileno(), offset, min(end - offset, _COPY_BYTES))
                if copied == 0:
                    return False
                offset += copied
        return True

    def sync(self) -> None:
        """Flush the file to the disk."""
        os.fsync(self._stream.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name, in the order of its header.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it has no header of a safetensors file.
    """
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"{path} has no header of a safetensors file")
        header = json.loads(stream.read(length))
    return dict(_entries(header, 8 + length))


def _entries(header: Mapping[str, Any], start: int) -> Iterable[tuple[str, Entry]]:
    for name, value in header.items():
        if name != "__metadata__":
            first, end = value["data_offsets"]
            yield name, Entry(value["dtype"], tuple(value["shape"]), start + first, end - first)
