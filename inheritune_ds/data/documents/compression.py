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

from inheritune_ds.data.documents.records import wrong_kind
from inheritune_ds.errors import CorpusError
from inheritune_ds.storage.file_kind import HEAD_BYTES, FileKind, kind_of

SUFFIXES = (".gz", ".bz2", ".zst")

_CHUNK_BYTES = 2**20
_PART_BYTES = 2**17
# zstandard cannot limit its output, and a block of 4 bytes may expand to 128 KiB: with this size a hostile file
# allocates 128 MiB at most. Ordinary files decompress as fast as in larger pieces.
_PIECE_BYTES = 2**12
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


def _gzip() -> Any:
    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)


def _zstandard() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()


_FORMATS: dict[str, tuple[FileKind, Callable[[], Any], tuple[int, ...], bytes]] = {
    ".gz": (FileKind.GZIP, _gzip, (_CHUNK_BYTES,), b"\0"),
    ".bz2": (FileKind.BZIP2, bz2.BZ2Decompressor, (_CHUNK_BYTES,), b""),
    ".zst": (FileKind.ZSTD, _zstandard, (), b""),
}
"""Kind of the file, decompressor of one frame (a file may hold several), limit of its output, and padding that may
follow a frame."""


class _Unpacked(io.RawIOBase):
    def __init__(self, path: Path, file: io.RawIOBase, on_bytes: Callable[[int], None]) -> None:
        self._file = file
        self._on_bytes = on_bytes
        self._parts = _unpacked(self._chunks(), path) if path.suffix in _FORMATS else self._chunks()
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


def _unpacked(chunks: Iterator[bytes], path: Path) -> Iterator[bytes]:
    """Yield the content of a file's frames, never an empty part."""
    expected, new_frame, limit, padding = _FORMATS[path.suffix]
    frame, ended_frames, inside = new_frame(), 0, False
    for piece in (chunk[at : at + _PIECE_BYTES] for chunk in chunks for at in range(0, len(chunk), _PIECE_BYTES)):
        if not (inside or ended_frames) and (kind := kind_of(piece[:HEAD_BYTES])) not in (expected, None):
            raise wrong_kind(path, kind)
        left = piece
        while left or not getattr(frame, "needs_input", True):  # bz2 keeps input that its limit has left over
            if ended_frames and not inside:
                left = left.lstrip(padding)
                if not left:
                    break
            inside = True
            try:
                ready = frame.decompress(left, *limit)
            except Exception as error:  # noqa: BLE001  zlib.error, zstandard.ZstdError, bz2's bare OSError
                raise _damaged(path, str(error)) from None
            if ready:
                yield ready
            left = frame.unused_data if frame.eof else getattr(frame, "unconsumed_tail", b"")
            if frame.eof:
                frame, ended_frames, inside = new_frame(), ended_frames + 1, False
    if inside or not ended_frames:
        raise _damaged(path, "its end is missing")


def _damaged(path: Path, reason: str) -> CorpusError:
    return CorpusError(
        f"corpus file {path}: it is truncated or damaged ({reason})",
        action="copy or download it again, then compare its size with the original",
    )
