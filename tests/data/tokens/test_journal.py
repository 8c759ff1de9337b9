import hashlib
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from inheritune_ds.data.tokens.journal import JOURNAL_FILES, NAME, Journal, remove_journal
from inheritune_ds.errors import StorageError


def digest(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def test_journal_keeps_what_was_committed_and_nothing_else(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.state() is None
    assert [journal.is_new(digest(number)) for number in (1, 1)] == [True, False]
    journal.commit({"number": 1})
    journal.commit({"b": 1, "a": [2, {"c": ""}]})
    assert journal.is_new(digest(2))
    journal.close()
    journal = Journal(tmp_path)
    assert json.dumps(journal.state()) == '{"b": 1, "a": [2, {"c": ""}]}', "the manifest keeps the order of its keys"
    assert [journal.is_new(digest(number)) for number in (1, 2)] == [False, True]
    journal.close()


def write_invalid_state(path: Path) -> None:
    journal = Journal(path.parent)
    journal.commit({"number": 1})
    journal.close()
    with closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE state SET document = '{'")
        database.commit()


@pytest.mark.parametrize("content", [b"", b"torn" * 5000, b"SQLite format 3\0" + bytes(20_000), None])
def test_journal_starts_over_if_it_is_damaged(tmp_path: Path, content: bytes | None) -> None:
    if content is None:
        write_invalid_state(tmp_path / NAME)
    else:
        (tmp_path / NAME).write_bytes(content)
    journal = Journal(tmp_path)
    assert journal.state() is None
    assert journal.is_new(digest(1))
    journal.commit({})
    journal.close()


def test_remove_journal_leaves_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.commit({})
    journal.close()
    (tmp_path / JOURNAL_FILES[1]).touch()  # of a killed process
    remove_journal(tmp_path)
    remove_journal(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_journal_names_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=rf"{NAME} cannot be written: .*\n  do: free some space") as caught:
        Journal(tmp_path / "none")
    assert str(tmp_path / "none") in caught.value.problem
