"""Bytes of a corpus file, unpacked on the way: gzip, bzip2 and Zstandard.

Memory is bounded whatever the file holds, and a file that is cut off or damaged is noticed: Python's own bz2 module
stops without a word where a later part of the file is damaged, and zstandard's reader where the file is cut off.
"""

import bz2
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from inheritune_ds.errors import CorpusError

SUFFIXES = (".gz", ".bz2", ".zst")

_CHUNK_BYTES = 2**20
# What is left of a part is copied whenever some of it was unpacked, so parts are small.
_PART_BYTES = 2**17
# zstandard cannot limit what it gives at once, and a block of 4 bytes may stand for 128 KiB: a hostile file
# gets 128 MiB with this. An ordinary one is unpacked at the same speed as in larger pieces.
_ZSTD_PIECE_BYTES = 2**12
# Corpora packed with `zstd --long=31` need a window of this size (RedPajama and the Pile are).
_ZSTD_WINDOW_BYTES = 2**31


def open_unpacked(path: Path, on_bytes: Callable[[int], None], file: io.RawIOBase | None = None) -> io.BufferedReader:
    """Open a file for reading what is packed in it; one without such an ending is read as it is.

    Args:
        path: The file; its ending tells how it is packed.
        on_bytes: Told the bytes of every part of the file (packed) as it is read.
        file: The file where it is open already, at its beginning, such as one on another machine; closed with the
            stream. `path` is then its name only.

    Returns:
        A stream whose `read` raises CorpusError where the file is cut off or damaged.

    Raises:
        OSError: The file cannot be opened.
    """
    return io.BufferedReader(_Unpacked(path, file or path.open("rb", buffering=0), on_bytes), _CHUNK_BYTES)


class _Frame(Protocol):
    """One gzip member, bzip2 stream or Zstandard frame; a file may hold several."""

    padding: bytes
    """Bytes that may follow it and mean nothing."""

    @property
    def ended(self) -> bool:
        """Whether its end was seen."""

    @property
    def pending(self) -> bool:
        """Whether it can give more without being given more."""

    def take(self, packed: bytes) -> tuple[bytes, bytes]:
        """Unpack; returns (unpacked bytes, packed bytes that were not used)."""


class _Gzip:
    padding = b"\0"
    pending = False

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

    @property
    def ended(self) -> bool:
        return self._stream.eof

    def take(self, packed: bytes) -> tuple[bytes, bytes]:
        ready = self._stream.decompress(packed, _CHUNK_BYTES)
        return ready, self._stream.unused_data if self._stream.eof else self._stream.unconsumed_tail


class _Bzip2:
    padding = b""

    def __init__(self) -> None:
        self._stream = bz2.BZ2Decompressor()

    @property
    def ended(self) -> bool:
        return self._stream.eof

    @property
    def pending(self) -> bool:
        return not self._stream.needs_input and not self._stream.eof

    def take(self, packed: bytes) -> tuple[bytes, bytes]:
        return self._stream.decompress(packed, _CHUNK_BYTES), self._stream.unused_data


class _Zstandard:
    padding = b""
    pending = False

    def __init__(self) -> None:
        import zstandard

        self._stream = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()

    @property
    def ended(self) -> bool:
        return self._stream.eof

    def take(self, packed: bytes) -> tuple[bytes, bytes]:
        ready = self._stream.decompress(packed[:_ZSTD_PIECE_BYTES])
        return ready, self._stream.unused_data + packed[_ZSTD_PIECE_BYTES:]


_FRAMES: dict[str, Callable[[], _Frame]] = {".gz": _Gzip, ".bz2": _Bzip2, ".zst": _Zstandard}


class _Unpacked(io.RawIOBase):
    def __init__(self, path: Path, file: io.RawIOBase, on_bytes: Callable[[int], None]) -> None:
        self._file = file
        self._on_bytes = on_bytes
        new_frame = _FRAMES.get(path.suffix)
        self._parts = _unpacked(self._chunks(), new_frame, path) if new_frame else self._chunks()
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        if not self._ready:
            self._ready = memoryview(next(self._parts, b""))
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _chunks(self) -> Iterator[bytes]:
        while chunk := self._file.read(_PART_BYTES):
            self._on_bytes(len(chunk))
            yield chunk


def _unpacked(chunks: Iterator[bytes], new_frame: Callable[[], _Frame], path: Path) -> Iterator[bytes]:
    """Yield what the frames of a file hold, never an empty part."""
    frame, ended_frames, inside = new_frame(), 0, False
    for chunk in chunks:
        left = chunk
        while left or frame.pending:
            if ended_frames and not inside:
                left = left.lstrip(frame.padding)
                if not left:
                    break
            inside = True
            try:
                ready, left = frame.take(left)
            except Exception as error:  # noqa: BLE001  zlib.error, zstandard.ZstdError, bz2's bare OSError
                raise _damaged(path, str(error)) from None
            if ready:
                yield ready
            if frame.ended:
                frame, ended_frames, inside = new_frame(), ended_frames + 1, False
    if inside or not ended_frames:
        raise _damaged(path, "its end is missing")


def _damaged(path: Path, reason: str) -> CorpusError:
    return CorpusError(
        f"corpus file {path}: it is cut off or damaged ({reason})",
        action="copy or download it again, then compare its size with the original",
    )
