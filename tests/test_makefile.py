"""Errors of `make` on a machine with missing requirements, before it installs anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
OLD_PYTHON = """#!/bin/sh
[ "$1" = --version ] && echo "Python 3.9.2"
exit 1
"""
NO_VENV = """#!/bin/sh
case "$2" in *venv*) exit 1;; esac
"""
NO_HEADERS = """#!/bin/sh
case "$2" in *Python.h*) exit 1;; esac
"""
WHOLE_PYTHON = f"""#!/bin/sh
exec {sys.executable} "$@"
"""


def make(folder: Path, *, python: str, **environ: str) -> subprocess.CompletedProcess[str]:
    venv = folder / ".venv"
    command = ["make", "--no-print-directory", f"VENV={venv}", f"PYTHON={python}", f"{venv}/bin/python"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "CXX"))}
    return subprocess.run(
        command, cwd=REPOSITORY, env={**inherited, **environ}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("stand_in", "problem", "action"),
    [
        (OLD_PYTHON, "Python 3.11 or newer is needed, and '{}' is not one: Python 3.9.2", "PYTHON=/path/to/python3.11"),
        (NO_VENV, "its venv module is missing", "apt-get install python3-venv"),
        (NO_HEADERS, "(Python.h) are missing", "apt-get install python3-dev"),
        (WHOLE_PYTHON, "No C++ compiler: 'no-such-compiler' is not on the PATH", "apt-get install g++"),
    ],
    ids=["old", "no venv", "no headers", "no compiler"],
)
def test_make_reports_missing_parts(tmp_path: Path, stand_in: str, problem: str, action: str) -> None:
    python = tmp_path / "python"
    python.write_text(stand_in)
    python.chmod(0o755)
    done = make(tmp_path, python=str(python), CXX="no-such-compiler")
    assert done.returncode != 0
    assert problem.format(python) in done.stderr
    assert action in done.stderr
    assert not (tmp_path / ".venv").exists()
