"""Streams a corpus file, decompressing gzip, bzip2 and Zstandard.

Memory is bounded for any file, and a truncated or damaged file is detected: Python's own bz2 module stops silently if
a later part of the file is damaged, and zstandard's reader does if the file is truncated.
"""

import bz2
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from inheritune_ds.errors import CorpusError

SUFFIXES = (".gz", ".bz2", ".zst")

_CHUNK_BYTES = 2**20
# The remainder of a part is copied after every call, so parts are small.
_PART_BYTES = 2**17
# zstandard cannot limit its output, and a block of 4 bytes may expand to 128 KiB: with this size a hostile file
# allocates 128 MiB at most. Ordinary files decompress as fast as in larger pieces.
_ZSTD_PIECE_BYTES = 2**12
# Corpora packed with `zstd --long=31` need a window of this size (RedPajama and the Pile are).
_ZSTD_WINDOW_BYTES = 2**31


def open_unpacked(path: Path, on_bytes: Callable[[int], None], file: io.RawIOBase | None = None) -> io.BufferedReader:
    """Open a file and decompress it by its suffix; other suffixes are read unchanged.

    If `file` is given (open and at its beginning, such as one on another machine), `path` is only its name. `on_bytes`
    receives the number of compressed bytes of every part. `read` raises CorpusError if the file is truncated or
    damaged.

    Raises:
        OSError: The file cannot be opened.
    """
    return io.BufferedReader(_Unpacked(path, file or path.open("rb", buffering=0), on_bytes), _CHUNK_BYTES)


class _Frame:
    """One gzip member, bzip2 stream or Zstandard frame; a file may hold several."""

    padding = b""
    """Bytes without meaning that may follow the frame."""
    _stream: Any

    @property
    def ended(self) -> bool:
        """Whether the end of the frame was read."""
        return bool(self._stream.eof)

    @property
    def pending(self) -> bool:
        """Whether it can return more output without more input."""
        return False

    def take(self, packed: bytes) -> tuple[bytes, bytes]:
        """Decompress; returns (output, unused input)."""
        raise NotImplementedError


class _Gzip(_Frame):
    padding = b"\0"

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

    def take(self, packed: bytes) -> tuple[bytes, bytes]:
        ready = self._stream.decompress(packed, _CHUNK_BYTES)
        return ready, self._stream.unused_data if self._stream.eof else self._stream.unconsumed_tail


class _Bzip2(_Frame):
    def __init__(self) -> None:
        self._stream = bz2.BZ2Decompressor()

    @property
    def pending(self) -> bool:
        return not self._stream.needs_input and not self._stream.eof

    def take(self, packed: bytes) -> tuple[bytes, bytes]:
        return self._stream.decompress(packed, _CHUNK_BYTES), self._stream.unused_data


class _Zstandard(_Frame):
    def __init__(self) -> None:
        import zstandard

        self._stream = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()

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
    """Yield the content of a file's frames, never an empty part."""
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
        f"corpus file {path}: it is truncated or damaged ({reason})",
        action="copy or download it again, then compare its size with the original",
    )
