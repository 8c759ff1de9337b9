import hashlib
import sqlite3
from pathlib import Path

import pytest

from inheritune_ds.data.tokens.journal import JOURNAL_FILES, NAME, Journal, remove_journal
from inheritune_ds.errors import StorageError


def digest(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def test_what_was_committed_is_there_again_and_nothing_else(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.state() is None
    assert journal.is_new(digest(1))
    assert not journal.is_new(digest(1))
    journal.commit({"b": 1, "a": [2, {"c": ""}]})
    assert journal.is_new(digest(2))
    journal.close()
    journal = Journal(tmp_path)
    state = journal.state()
    assert state == {"b": 1, "a": [2, {"c": ""}]}
    assert state is not None
    assert list(state) == ["b", "a"], "the manifest is made of it: its keys keep their order"
    assert not journal.is_new(digest(1))
    assert journal.is_new(digest(2))
    journal.close()


def test_a_later_state_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for number in range(3):
        journal.commit({"number": number})
    assert journal.state() == {"number": 2}
    journal.close()


@pytest.mark.parametrize("content", [b"", b"torn" * 5000, b"SQLite format 3\0" + bytes(20_000)])
def test_a_torn_journal_is_begun_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    journal = Journal(tmp_path)
    assert journal.state() is None
    assert journal.is_new(digest(1))
    journal.commit({})
    journal.close()


def test_a_state_that_is_no_json_is_begun_anew(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.commit({"number": 1})
    journal.close()
    database = sqlite3.connect(tmp_path / NAME)
    database.execute("UPDATE state SET document = '{'")
    database.commit()
    database.close()
    journal = Journal(tmp_path)
    assert journal.state() is None
    journal.close()


def test_removing_leaves_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.commit({})
    journal.close()
    (tmp_path / JOURNAL_FILES[1]).touch()  # of a killed process
    remove_journal(tmp_path)
    remove_journal(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_journal_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=rf"{NAME} cannot be written: .*\n  do: free some space") as caught:
        Journal(tmp_path / "none")
    assert str(tmp_path / "none") in caught.value.problem
