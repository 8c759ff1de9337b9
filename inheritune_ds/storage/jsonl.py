"""A file of lines that only grows, on a disk that may be full for a while."""

import os
from contextlib import suppress
from pathlib import Path

from inheritune_ds.storage.files import storage_errors


class RowLog:
    """Appends whole lines; those that the disk refuses are kept, and written with the next.

    Args:
        path: The file; lines in it stay.

    Raises:
        StorageError: The file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        with storage_errors(path):
            self._descriptor: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._bytes = os.fstat(self._descriptor).st_size
        self._waiting: list[bytes] = []

    def append(self, line: str) -> OSError | None:
        """Write a line, and those that wait before it.

        Args:
            line: Without its end.

        Returns:
            Why the disk refuses, None if everything is written; a killed process leaves at most one incomplete line.
        """
        self._waiting.append(line.encode() + b"\n")
        return self._write()

    @property
    def waiting(self) -> int:
        """Lines that are not written."""
        return len(self._waiting)

    def close(self) -> OSError | None:
        """Write what waits, and let go of the file; a second call does nothing. Returns as `append` does."""
        if self._descriptor is None:
            return None
        refusal = self._write()
        os.close(self._descriptor)
        self._descriptor = None
        return refusal

    def _write(self) -> OSError | None:
        assert self._descriptor is not None
        data = memoryview(b"".join(self._waiting))
        done = 0
        try:
            while done < len(data):
                done += os.write(self._descriptor, data[done:])
        except OSError as error:
            with suppress(OSError):  # no half line: the next attempt begins anew
                os.ftruncate(self._descriptor, self._bytes)
            return error
        self._bytes += len(data)
        self._waiting.clear()
        return None
