import os
from pathlib import Path

import pytest

from inheritune_ds.data.documents.change_check import FileMark, Snapshot, cannot_read
from inheritune_ds.errors import CorpusError


def test_snapshot_is_content_with_files_that_stay(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text("text")
    snapshot = Snapshot.of([tmp_path / "a", tmp_path / "b"])
    snapshot.check()
    assert [mark.size for mark in snapshot.marks] == [4, 4]


def test_snapshot_notices_a_file_that_vanished(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("text")
    snapshot = Snapshot.of([path])
    path.unlink()
    with pytest.raises(CorpusError, match=r"(?s)/a: it vanished while the corpus was read \(no such file.*put it back"):
        snapshot.check()


def test_snapshot_notices_a_file_that_was_changed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("text")
    snapshot = Snapshot.of([path])
    path.write_text("text and more")
    with pytest.raises(CorpusError, match=r"it was changed while .* \(it had 4 bytes and has 13\)"):
        snapshot.check()


def test_snapshot_notices_a_change_that_keeps_the_size(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("text")
    snapshot = Snapshot.of([path])
    os.utime(path, ns=(0, snapshot.marks[0].mtime_ns + 1))
    with pytest.raises(CorpusError, match=r"(?s)it was changed.*let its writer finish"):
        snapshot.check()


def test_mark_of_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"/gone: it cannot be read \(no such file or directory\)"):
        FileMark.of(tmp_path / "gone")


def test_cannot_read_says_something_whatever_the_system_said() -> None:
    assert "a: it cannot be read (permission denied)" in str(cannot_read("a", PermissionError(13, "Permission denied")))
    assert "a: it cannot be read (unreadable)" in str(cannot_read("a", OSError()))
