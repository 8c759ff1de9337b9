"""Write safetensors files one tensor at a time, and read their headers, without torch.

The format (huggingface/safetensors, README): 8 bytes with the length of the header, the header in JSON, padded with
spaces to a multiple of 8 bytes, then the tensors without gaps.
"""

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

_COPY_BYTES = 1 << 26
_MAX_HEADER_BYTES = 100 * 10**6  # the limit of safetensors itself


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    dtype: str
    """Its name in safetensors, such as F32."""
    shape: tuple[int, ...]
    start: int
    """Offset of the first byte in the file."""
    nbytes: int


class SafetensorsWriter:
    """Writes one new safetensors file, one tensor after the other. All methods may raise an OSError.

    `tensors` has dtype (its name in safetensors), shape and bytes of each tensor by name, in the order of the file;
    `mode` has the permissions of the file, before the umask.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], int]], *, mode: int = 0o666
    ) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, (dtype, shape, nbytes) in tensors.items():
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
            at += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
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
        """Copy the bytes of the next tensor from another file in the kernel; False if that file is too short."""
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
    header.pop("__metadata__", None)
    entries = {}
    for name, value in header.items():
        first, end = value["data_offsets"]
        entries[name] = Entry(value["dtype"], tuple(value["shape"]), 8 + length + first, end - first)
    return entries
