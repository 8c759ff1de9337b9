"""How far a preparation has come, so that a killed one goes on at the same document.

One SQLite file holds both the place reached and the hashes of the documents seen, and both change in one transaction.
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
    """The journal of a folder that is being filled.

    Args:
        folder: Where it lies.

    Raises:
        StorageError: It cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        with storage_errors(self.path):
            try:
                self._database = self._open()
                self.state()
            except (sqlite3.DatabaseError, ValueError):  # torn by a power cut: begin anew
                remove_journal(folder)
                self._database = self._open()

    def _open(self) -> sqlite3.Connection:
        # Transactions are begun and ended by hand: every change since the last commit is undone by a kill.
        database: sqlite3.Connection = self._refused(sqlite3.connect, self.path, isolation_level=None)
        self._refused(database.execute, f"PRAGMA cache_size = -{_CACHE_KIB}")
        self._refused(database.execute, "CREATE TABLE IF NOT EXISTS state (id INTEGER PRIMARY KEY, document TEXT)")
        self._refused(database.execute, "CREATE TABLE IF NOT EXISTS seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        self._refused(database.execute, "BEGIN")
        return database

    def state(self) -> dict[str, Any] | None:
        """What was last committed; None in a new journal."""
        row = self._refused(self._database.execute, "SELECT document FROM state WHERE id = 0").fetchone()
        return json.loads(row[0]) if row else None

    def is_new(self, digest: bytes) -> bool:
        """Note a document; returns whether it is seen for the first time.

        Args:
            digest: Its sha256, of which 16 bytes are kept.
        """
        cursor = self._refused(self._database.execute, "INSERT OR IGNORE INTO seen VALUES (?)", (digest[:16],))
        return bool(cursor.rowcount)

    def commit(self, state: dict[str, Any]) -> None:
        """Keep a state and every document noted so far."""
        self._refused(self._database.execute, "INSERT OR REPLACE INTO state VALUES (0, ?)", (json.dumps(state),))
        self._refused(self._database.execute, "COMMIT")
        self._refused(self._database.execute, "BEGIN")

    def close(self) -> None:
        """Leave the journal as it was last committed."""
        with closing(self._database):
            if self._database.in_transaction:
                self._database.rollback()

    def _refused(self, execute: Any, *arguments: Any, **settings: Any) -> Any:
        """Run a statement; a full disk is told as every other one is."""
        try:
            return execute(*arguments, **settings)
        except sqlite3.OperationalError as error:
            raise StorageError(
                f"{self.path} cannot be written: {error}",
                action="free some space, then give the same command again: it goes on where it stopped",
            ) from None


def remove_journal(folder: Path) -> None:
    """Delete the journal of a folder, closed: nothing has to be gone on with any more.

    Raises:
        StorageError: It cannot be deleted.
    """
    with storage_errors(folder):
        for name in JOURNAL_FILES:
            (folder / name).unlink(missing_ok=True)
