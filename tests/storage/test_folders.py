import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from inheritune_ds.errors import RunFolderError, StorageError
from inheritune_ds.storage.folders import damaged_files, describe_files, exclusive, has_files, staged, tidy


def complete(folder: Path) -> bool:
    return (folder / "done").is_file()


def test_staged_publishes_a_filled_folder(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "final"
    with staged(final, complete) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_text("x")
        assert not final.exists()
    assert (final / "sub" / "file").read_text() == "x"
    assert [path.name for path in final.parent.iterdir()] == ["final"]


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
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_staged_keeps_what_living_processes_and_other_machines_are_writing(tmp_path: Path) -> None:
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
    assert [path.name for path in final.iterdir()] == ["done"]
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_staged_replaces_what_is_not_usable(tmp_path: Path, kind: str) -> None:
    final = tmp_path / "final"
    if kind == "folder":
        final.mkdir()
        (final / "half").touch()
    else:
        final.touch()
    with staged(final, complete) as staging:
        (staging / "done").touch()
    assert [path.name for path in final.iterdir()] == ["done"]
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_staged_names_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = r"(?s)file.* cannot be written: .*do: choose a folder"
    with pytest.raises(StorageError, match=message), staged(tmp_path / "file" / "final", complete):
        pytest.fail("there is no folder to fill")


def test_staged_says_that_publishing_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    message = r"(?s)final cannot be written: No space left.*free some space"
    with pytest.raises(StorageError, match=message), staged(tmp_path / "final", complete) as staging:
        (staging / "done").touch()
    assert list(tmp_path.iterdir()) == []


def test_staged_keeps_the_older_folder_after_an_error_and_replaces_it_at_the_end(tmp_path: Path) -> None:
    final = tmp_path / "final"
    with staged(final) as staging:
        (staging / "old").touch()
    with pytest.raises(RuntimeError), staged(final) as staging:  # noqa: PT012
        (staging / "half").touch()
        raise RuntimeError
    assert [path.name for path in final.iterdir()] == ["old"]
    with staged(final) as staging:
        (staging / "new").touch()
        assert [path.name for path in final.iterdir()] == ["old"]
    assert [path.name for path in final.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


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


def test_described_files_are_missed_by_presence_and_size(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_bytes(b"abc")
    described = describe_files(tmp_path)
    assert described == {"sub/file": {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}}
    assert has_files(tmp_path, described)
    (tmp_path / "sub" / "file").write_bytes(b"ab")
    assert not has_files(tmp_path, described)
    (tmp_path / "sub" / "file").unlink()
    assert not has_files(tmp_path, described)


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_staged_leaves_alone_what_appears_meanwhile_and_must_not_be_replaced(tmp_path: Path, kind: str) -> None:
    final = tmp_path / "final"

    def appear() -> None:
        if kind == "folder":
            final.mkdir()
            (final / "theirs").touch()
        elif kind == "file":
            final.write_text("theirs")
        else:
            final.symlink_to(tmp_path / "elsewhere")

    message = r"(?s)final was free when this began.*do: name a new folder"
    with pytest.raises(RunFolderError, match=message), staged(final, complete, replaceable=lambda _: False):
        appear()
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert kind != "folder" or (final / "theirs").is_file()
    assert kind != "file" or final.read_text() == "theirs"
    assert kind != "link" or final.is_symlink()


def test_staged_fills_an_empty_folder_that_appears_meanwhile(tmp_path: Path) -> None:
    with staged(tmp_path / "final", complete, replaceable=lambda _: False) as staging:
        (staging / "done").touch()
        (tmp_path / "final").mkdir()
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["done"]


def test_staged_replaces_a_link_and_leaves_nothing_of_it(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "final").symlink_to(tmp_path / "elsewhere")
    with staged(tmp_path / "final") as staging:
        (staging / "done").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"final", "elsewhere"}
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_staged_removes_replaced_folders_and_links_of_ended_processes(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    stem = f".final.{socket.gethostname()}.{ended.pid}"
    (tmp_path / f"{stem}.broken.tmp").mkdir()
    (tmp_path / f"{stem}.tmp").symlink_to(tmp_path)
    with staged(tmp_path / "final") as staging:
        (staging / "done").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_staged_brings_the_older_folder_back_when_the_newer_cannot_take_its_place(
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
    assert [path.name for path in final.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    described = describe_files(tmp_path)
    assert damaged_files(tmp_path, described, hashes=True) == []
    (tmp_path / "file").write_bytes(b"abd")
    assert damaged_files(tmp_path, described) == []
    assert damaged_files(tmp_path, described, hashes=True) == ["file"]
    assert damaged_files(tmp_path, {"file": 3}) == ["file"]
    assert damaged_files(tmp_path, None) == ["the list of files"]


def test_exclusive_keeps_what_was_filled_in_and_leaves_nothing_else(
    tmp_path: Path, logged: Callable[[], list[str]]
) -> None:
    with exclusive(tmp_path / "empty"):
        assert (tmp_path / "empty").is_dir()
    with pytest.raises(RuntimeError), exclusive(tmp_path / "half"):  # noqa: PT012
        (tmp_path / "half" / "file").touch()
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["half"]
    with exclusive(tmp_path / "half"):
        assert (tmp_path / "half" / "file").exists()
    assert logged() == []


def test_tidy_removes_what_a_killed_process_has_left_beside_the_published_folder(tmp_path: Path) -> None:
    broken = tmp_path / f".final.{socket.gethostname()}.{2**22 + 1}.broken.tmp"
    broken.mkdir()
    (tmp_path / "partial.lock").touch()
    (tmp_path / "partial").mkdir()
    (tmp_path / "final").mkdir()
    tidy(tmp_path / "partial")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    tidy(tmp_path / "partial")
    tidy(tmp_path / "none" / "partial")


def test_tidy_leaves_a_lock_that_is_held_and_a_folder_with_something_in_it(tmp_path: Path) -> None:
    with exclusive(tmp_path / "partial"):
        tidy(tmp_path / "partial")
        assert {path.name for path in tmp_path.iterdir()} == {"partial", "partial.lock"}
        (tmp_path / "partial" / "file").touch()
    tidy(tmp_path / "partial")
    assert [path.name for path in tmp_path.iterdir()] == ["partial"]


def test_files_that_are_left_out_are_not_described(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).touch()
    assert list(describe_files(tmp_path, left_out=["two"])) == ["one"]
