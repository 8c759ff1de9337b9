"""Detects changed corpus files by size and modification time."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from inheritune_ds.errors import CorpusError


@dataclass(frozen=True)
class FileMark:
    """Size and modification time of a file."""

    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """Stat a file; raise a CorpusError if it cannot be read."""
        try:
            found = path.stat()
        except OSError as error:
            raise cannot_read(path, error) from None
        return cls(path, found.st_size, found.st_mtime_ns)

    def check(self) -> None:
        """Stat the file again; raise a CorpusError if it is gone or was changed."""
        try:
            now = self.path.stat()
        except OSError as error:
            raise CorpusError(
                f"corpus file {self.path}: it vanished while the corpus was read ({_reason(error)})",
                action="restore it and rerun the same command",
            ) from None
        if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns):
            raise CorpusError(
                f"corpus file {self.path}: it was changed while the corpus was read "
                f"(it had {self.size:,} bytes and has {now.st_size:,})",
                action="let its writer finish, then rerun the same command",
            )


def cannot_read(path: Path | str, error: OSError) -> CorpusError:
    """The error of a file or folder that cannot be read."""
    return CorpusError(
        f"corpus file {path}: it cannot be read ({_reason(error)})",
        action="check that it exists and that this user may read it",
    )


def _reason(error: OSError) -> str:
    # Not error.strerror: pyarrow sets it to a whole sentence with the path.
    return (os.strerror(error.errno) if error.errno else str(error) or "unreadable").lower()
