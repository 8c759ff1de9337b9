import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from inheritune_ds.errors import MachineError, StorageError
from inheritune_ds.training.toolchain import check_toolchain, noexec_notes


def test_a_compiler_that_works_and_a_folder_that_can_be_made_are_accepted(tmp_path: Path) -> None:
    environ = {key: value for key, value in os.environ.items() if key != "TORCH_EXTENSIONS_DIR"}
    check_toolchain(environ, tmp_path / "a" / "b")
    assert [*(tmp_path / "a" / "b").iterdir()] == []
    check_toolchain({**environ, "CXX": "c++ -O0", "TORCH_EXTENSIONS_DIR": str(tmp_path / "c")}, Path("/dev/null/x"))
    assert (tmp_path / "c").is_dir()


def script(folder: Path, body: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("exit 4", "exit code 4"),
        ("echo 'In file x' >&2; echo 'x:1: fatal error: Python.h: no such file' >&2; exit 1", "x:1: fatal error: Py"),
        ("echo 'cannot find crt1.o' >&2; exit 1", "cannot find crt1.o"),
    ],
)
def test_a_compiler_that_fails_is_refused_with_its_message(body: str, message: str, tmp_path: Path) -> None:
    compiler = script(tmp_path, body)
    with pytest.raises(MachineError) as caught:
        check_toolchain({**os.environ, "CXX": compiler}, tmp_path)
    assert caught.value.problem.startswith(f"the C++ compiler ({compiler}) does not work: {message}")
    assert "python3-dev" in caught.value.action
    assert caught.value.exit_code == 10


@pytest.mark.parametrize(("named", "why"), [("/nonexistent", "no such file or directory"), ("", ""), ("a 'b", "")])
def test_a_missing_compiler_is_refused(named: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(MachineError) as caught:
        check_toolchain({**os.environ, "CXX": named}, tmp_path)
    assert caught.value.problem.startswith(f"no C++ compiler found ({named}): {why}")
    assert "or named by CXX" in caught.value.allowed


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "extensions"
    with pytest.raises(StorageError) as caught:
        check_toolchain({**os.environ, "TORCH_EXTENSIONS_DIR": str(folder)}, tmp_path)
    assert caught.value.problem.startswith(f"{folder} cannot be written: not a directory; DeepSpeed builds")
    assert "set TORCH_EXTENSIONS_DIR" in caught.value.action
    assert caught.value.exit_code == 5


def test_the_lock_of_a_killed_build_is_refused(tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    other = tmp_path / "of_another_project" / "lock"
    other.parent.mkdir()
    other.touch()
    an_hour_ago = time.time() - 3600.0
    os.utime(other, (an_hour_ago, an_hour_ago))
    environ = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    check_toolchain(environ, tmp_path)  # a build may be in progress
    os.utime(lock, (an_hour_ago, an_hour_ago))
    with pytest.raises(MachineError) as caught:
        check_toolchain(environ, tmp_path)
    assert caught.value.problem.startswith(f"{lock} is of a killed build of DeepSpeed's cpu_adam")
    assert caught.value.action == f"rm {lock}"


@pytest.fixture
def noexec(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file system is mounted noexec."""
    found = os.statvfs("/")
    flags = found.f_flag | os.ST_NOEXEC
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=flags))


@pytest.mark.usefixtures("noexec")
@pytest.mark.parametrize("named", [True, False])
def test_a_folder_that_is_mounted_noexec_is_refused(named: str, tmp_path: Path) -> None:
    environ = {key: value for key, value in os.environ.items() if key != "TORCH_EXTENSIONS_DIR"}
    extensions = {"TORCH_EXTENSIONS_DIR": str(tmp_path)} if named else {}
    with pytest.raises(MachineError) as caught:
        check_toolchain({**environ, **extensions}, tmp_path)
    assert caught.value.problem.startswith(f"{tmp_path} is on a file system that is mounted noexec")
    assert caught.value.action.startswith("set TORCH_EXTENSIONS_DIR")
    assert caught.value.exit_code == 10


@pytest.mark.usefixtures("noexec")
@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"TORCH_EXTENSIONS_DIR": "/tmp/not/there"}, "/tmp/not/there"),
        ({"XDG_CACHE_HOME": "/tmp/cache"}, "/tmp/cache"),
        ({}, str(Path("~/.cache").expanduser())),
    ],
)
def test_a_plan_notes_a_folder_that_is_mounted_noexec(environ: dict[str, str], folder: str) -> None:
    (note,) = noexec_notes(environ)
    assert note.startswith(f"{folder} is mounted noexec: ")


def test_a_plan_notes_nothing_about_other_folders(tmp_path: Path) -> None:
    assert noexec_notes({"TORCH_EXTENSIONS_DIR": str(tmp_path / "new")}) == []
