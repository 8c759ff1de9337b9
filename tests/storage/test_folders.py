import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from inheritune_ds.errors import RunFolderError, StorageError
from inheritune_ds.storage.folders import damaged_files, describe_files, exclusive, staged, tidy


def complete(folder: Path) -> bool:
    return (folder / "done").is_file()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_staged_publishes_a_filled_folder(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "final"
    with staged(final, complete) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_text("x")
        assert not final.exists()
    assert (final / "sub" / "file").read_text() == "x"
    assert names(final.parent) == ["final"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_staged_leaves_nothing_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), staged(tmp_path / "final", complete) as staging:  # noqa: PT012
        (staging / "half").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_staged_leaves_nothing_visible_after_a_kill(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom inheritune_ds.storage.folders import staged\n"
        "with staged(Path(sys.argv[1]), lambda folder: True) as staging:\n"
        "    (staging / 'half').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path / "final")], check=False)
    assert ended.returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".final.")
    with staged(tmp_path / "final", complete) as staging:
        assert not left.exists()
        (staging / "done").touch()
    assert names(tmp_path) == ["final"]


def test_staged_keeps_folders_of_running_processes_and_other_machines(tmp_path: Path) -> None:
    host = socket.gethostname()
    mine = tmp_path / f".final.{host}.{os.getpid()}.tmp"
    living = tmp_path / f".other.{host}.{os.getppid()}.tmp"
    elsewhere = tmp_path / ".final.another-host.1.tmp"
    for folder in (mine, living, elsewhere):
        folder.mkdir()
    (mine / "half").touch()
    with staged(tmp_path / "final", complete) as staging:
        assert list(staging.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"final", living.name, elsewhere.name}


def test_staged_accepts_the_result_of_a_faster_process(tmp_path: Path) -> None:
    final = tmp_path / "final"
    with staged(final, complete) as staging:
        (staging / "mine").touch()
        final.mkdir()
        (final / "done").touch()
    assert names(final) == ["done"]
    assert names(tmp_path) == ["final"]


def appear(final: Path, kind: str) -> None:
    """Create a folder, file or link, as another process may."""
    if kind == "folder":
        final.mkdir()
        (final / "theirs").touch()
    elif kind == "file":
        final.write_text("theirs")
    else:
        (final.parent / "elsewhere").mkdir()
        final.symlink_to(final.parent / "elsewhere")


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_staged_replaces_an_unusable_folder(tmp_path: Path, kind: str) -> None:
    final = tmp_path / "final"
    appear(final, kind)
    with staged(final, complete) as staging:
        (staging / "done").touch()
    assert names(final) == ["done"]
    assert names(tmp_path) == (["elsewhere", "final"] if kind == "link" else ["final"])
    assert kind != "link" or list((tmp_path / "elsewhere").iterdir()) == []


def test_staged_names_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = r"(?s)file.* cannot be written: .*do: choose a folder"
    with pytest.raises(StorageError, match=message), staged(tmp_path / "file" / "final", complete):
        pytest.fail("there is no folder to fill")


def test_staged_reports_a_failed_publication(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    message = r"(?s)final cannot be written: No space left.*free some space"
    with pytest.raises(StorageError, match=message), staged(tmp_path / "final", complete) as staging:
        (staging / "done").touch()
    assert list(tmp_path.iterdir()) == []


def test_staged_keeps_the_older_folder_until_the_end(tmp_path: Path) -> None:
    final = tmp_path / "final"
    with staged(final) as staging:
        (staging / "old").touch()
    with pytest.raises(RuntimeError), staged(final) as staging:  # noqa: PT012
        (staging / "half").touch()
        raise RuntimeError
    assert names(final) == ["old"]
    with staged(final) as staging:
        (staging / "new").touch()
        assert names(final) == ["old"]
    assert names(final) == ["new"]
    assert names(tmp_path) == ["final"]


def test_staged_syncs_everything_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync, rename = os.fsync, Path.rename

    def noting(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def renaming(self: Path, target: Path) -> Path:
        assert {self.stat().st_ino, (self / "a").stat().st_ino, (self / "b").stat().st_ino} <= set(synced)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(Path, "rename", renaming)
    with staged(tmp_path / "final") as staging:
        (staging / "a").mkdir()
        (staging / "b").write_text("x")
    assert synced[-1] == tmp_path.stat().st_ino


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_staged_does_not_replace_a_protected_folder(tmp_path: Path, kind: str) -> None:
    final = tmp_path / "final"
    message = r"(?s)final was created by another process in the meantime.*do: choose a new folder"
    with pytest.raises(RunFolderError, match=message), staged(final, complete, replaceable=lambda _: False):
        appear(final, kind)
    assert names(tmp_path) == (["elsewhere", "final"] if kind == "link" else ["final"])
    assert kind != "folder" or (final / "theirs").is_file()
    assert kind != "file" or final.read_text() == "theirs"
    assert kind != "link" or final.is_symlink()


def test_staged_replaces_an_empty_folder(tmp_path: Path) -> None:
    with staged(tmp_path / "final", complete, replaceable=lambda _: False) as staging:
        (staging / "done").touch()
        (tmp_path / "final").mkdir()
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["done"]


def test_staged_removes_replaced_folders_and_links_of_ended_processes(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    stem = f".final.{socket.gethostname()}.{ended.pid}"
    (tmp_path / f"{stem}.broken.tmp").mkdir()
    (tmp_path / f"{stem}.tmp").symlink_to(tmp_path)
    with staged(tmp_path / "final") as staging:
        (staging / "done").touch()
    assert names(tmp_path) == ["final"]


def test_staged_restores_the_older_folder_after_a_failed_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, rename = tmp_path / "final", Path.rename
    final.mkdir()
    (final / "old").touch()

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp") and ".broken." not in self.name and not final.exists():
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(StorageError, match="Input/output error"), staged(final) as staging:
        (staging / "new").touch()
    assert names(final) == ["old"]
    assert names(tmp_path) == ["final"]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "file"
    path.parent.mkdir()
    path.write_bytes(b"abc")
    (tmp_path / "other").touch()
    described = describe_files(tmp_path, ignored=["other"])
    assert described == {"sub/file": {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}}
    assert damaged_files(tmp_path, described, hashes=True) == []
    path.write_bytes(b"abd")
    assert damaged_files(tmp_path, described) == []
    assert damaged_files(tmp_path, described, hashes=True) == ["sub/file"]
    path.write_bytes(b"ab")
    assert damaged_files(tmp_path, described) == ["sub/file"]
    path.unlink()
    assert damaged_files(tmp_path, described) == ["sub/file"]
    assert damaged_files(tmp_path, {"file": 3}) == ["file"]
    assert damaged_files(tmp_path, None) == ["the list of files"]


def test_exclusive_keeps_only_the_filled_files(tmp_path: Path, logged: Callable[[], list[str]]) -> None:
    with exclusive(tmp_path / "empty"):
        assert (tmp_path / "empty").is_dir()
    with pytest.raises(RuntimeError), exclusive(tmp_path / "half"):  # noqa: PT012
        (tmp_path / "half" / "file").touch()
        raise RuntimeError
    assert names(tmp_path) == ["half"]
    with exclusive(tmp_path / "half"):
        assert (tmp_path / "half" / "file").exists()
    assert logged() == []


def test_tidy_removes_leftovers_of_a_killed_process(tmp_path: Path) -> None:
    broken = tmp_path / f".final.{socket.gethostname()}.{2**22 + 1}.broken.tmp"
    broken.mkdir()
    (tmp_path / "partial.lock").touch()
    (tmp_path / "partial").mkdir()
    (tmp_path / "final").mkdir()
    tidy(tmp_path / "partial")
    assert names(tmp_path) == ["final"]
    tidy(tmp_path / "partial")
    tidy(tmp_path / "none" / "partial")


def test_tidy_keeps_a_held_lock_and_a_filled_folder(tmp_path: Path) -> None:
    with exclusive(tmp_path / "partial"):
        tidy(tmp_path / "partial")
        assert {path.name for path in tmp_path.iterdir()} == {"partial", "partial.lock"}
        (tmp_path / "partial" / "file").touch()
    tidy(tmp_path / "partial")
    assert names(tmp_path) == ["partial"]
