"""Whether corpus files are still the ones that were found: by size and time of their last change."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from inheritune_ds.errors import CorpusError


@dataclass(frozen=True)
class FileMark:
    """A file as it stood at one moment.

    Attributes:
        path: The file.
        size: Bytes.
        mtime_ns: Time of its last change.
    """

    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """Look at a file.

        Raises:
            CorpusError: It cannot be looked at.
        """
        try:
            found = path.stat()
        except OSError as error:
            raise cannot_read(path, error) from None
        return cls(path, found.st_size, found.st_mtime_ns)

    def check(self) -> None:
        """Look again.

        Raises:
            CorpusError: The file is gone or was changed.
        """
        try:
            now = self.path.stat()
        except OSError as error:
            raise CorpusError(
                f"corpus file {self.path}: it vanished while the corpus was read ({_reason(error)})",
                action="put it back as it was and give the same command again",
            ) from None
        if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns):
            raise CorpusError(
                f"corpus file {self.path}: it was changed while the corpus was read "
                f"(it had {self.size:,} bytes and has {now.st_size:,})",
                action="let its writer finish, then give the same command again",
            )


@dataclass(frozen=True)
class Snapshot:
    """All files of a source as they stood at one moment; none for a source without local files."""

    marks: tuple[FileMark, ...] = ()

    @classmethod
    def of(cls, paths: Iterable[Path]) -> Self:
        """Look at files.

        Raises:
            CorpusError: One cannot be looked at.
        """
        return cls(tuple(FileMark.of(path) for path in paths))

    def check(self) -> None:
        """Look at them again.

        Raises:
            CorpusError: One is gone or was changed.
        """
        for mark in self.marks:
            mark.check()


def cannot_read(path: Path | str, error: OSError) -> CorpusError:
    """The error of a file or folder that the operating system does not let be read."""
    return CorpusError(
        f"corpus file {path}: it cannot be read ({_reason(error)})",
        action="check that it exists and that this user may read it",
    )


def _reason(error: OSError) -> str:
    # The system's own words: pyarrow puts a whole sentence, with the path, in their place.
    return (os.strerror(error.errno) if error.errno else str(error) or "unreadable").lower()
