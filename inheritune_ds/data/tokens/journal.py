"""Progress of a preparation, so that a killed one resumes at the same document.

One SQLite file holds the position and the hashes of the documents seen; one transaction changes both.
"""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from inheritune_ds.errors import StorageError
from inheritune_ds.storage.files import storage_errors

NAME = "progress.sqlite"
JOURNAL_FILES = (NAME, f"{NAME}-journal")
_CACHE_KIB = 65_536


class Journal:
    """The journal of a folder that is being filled. All methods may raise a StorageError."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        with storage_errors(self.path):
            try:
                self._database = self._open()
                self.state()
            except (sqlite3.DatabaseError, ValueError):  # damaged by a power failure: start over
                remove_journal(folder)
                self._database = self._open()

    def _open(self) -> sqlite3.Connection:
        # Explicit transactions: a kill undoes every change since the last commit.
        database: sqlite3.Connection = self._run(sqlite3.connect, self.path, isolation_level=None)
        self._run(database.execute, f"PRAGMA cache_size = -{_CACHE_KIB}")
        self._run(database.execute, "CREATE TABLE IF NOT EXISTS state (id INTEGER PRIMARY KEY, document TEXT)")
        self._run(database.execute, "CREATE TABLE IF NOT EXISTS seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        self._run(database.execute, "BEGIN")
        return database

    def state(self) -> dict[str, Any] | None:
        """The last committed state; None in a new journal."""
        row = self._run(self._database.execute, "SELECT document FROM state WHERE id = 0").fetchone()
        return json.loads(row[0]) if row else None

    def is_new(self, digest: bytes) -> bool:
        """Record a document by its sha256, of which 16 bytes are kept; returns whether it is new."""
        cursor = self._run(self._database.execute, "INSERT OR IGNORE INTO seen VALUES (?)", (digest[:16],))
        return bool(cursor.rowcount)

    def commit(self, state: dict[str, Any]) -> None:
        """Save a state and all documents recorded so far."""
        self._run(self._database.execute, "INSERT OR REPLACE INTO state VALUES (0, ?)", (json.dumps(state),))
        self._run(self._database.execute, "COMMIT")
        self._run(self._database.execute, "BEGIN")

    def close(self) -> None:
        """Close the journal in its last committed state."""
        with closing(self._database):
            if self._database.in_transaction:
                self._database.rollback()

    def _run(self, execute: Any, *arguments: Any, **settings: Any) -> Any:
        """Run a statement; report a full disk as a StorageError."""
        try:
            return execute(*arguments, **settings)
        except sqlite3.OperationalError as error:
            raise StorageError(
                f"{self.path} cannot be written: {error}",
                action="free some space, then rerun the same command to resume",
            ) from None


def remove_journal(folder: Path) -> None:
    """Delete the closed journal of a folder; raise a StorageError if that is refused."""
    with storage_errors(folder):
        for name in JOURNAL_FILES:
            (folder / name).unlink(missing_ok=True)
