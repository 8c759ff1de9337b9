import os
from collections.abc import Callable
from pathlib import Path

import pytest

from inheritune_ds.data.documents.change_check import FileMark, cannot_read
from inheritune_ds.errors import CorpusError


def change_mtime(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Path.unlink, r"(?s)/a: it vanished while the corpus was read \(no such file.*restore it"),
        (lambda path: path.write_text("more text"), r"it was changed while .* \(it had 4 bytes and has 9\)"),
        (change_mtime, r"(?s)it was changed.*let its writer finish"),
    ],
)
def test_mark_detects_a_change(change: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("text")
    mark = FileMark.of(path)
    mark.check()
    assert mark.size == 4
    change(path)
    with pytest.raises(CorpusError, match=message):
        mark.check()


def test_mark_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"/gone: it cannot be read \(no such file or directory\)"):
        FileMark.of(tmp_path / "gone")


@pytest.mark.parametrize(
    ("error", "reason"), [(PermissionError(13, "Permission denied"), "permission denied"), (OSError(), "unreadable")]
)
def test_cannot_read_names_a_reason(error: OSError, reason: str) -> None:
    assert f"a: it cannot be read ({reason})" in str(cannot_read("a", error))
