"""Check that DeepSpeed can build its operators on first use: the compiler and the folder of its builds."""

import os
import shlex
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from inheritune_ds.distributed.world import World
from inheritune_ds.errors import MachineError, StorageError


def check_device(kind: str, world: World, *, offload: bool) -> None:
    """Refuse a machine that the run would fail on, before anything is prepared; `kind` is `cuda` or `cpu`.

    Raises:
        MachineError: If a C++ compiler is needed and does not work, if torch cannot use the machine's GPU, or if
            there are fewer GPUs than local ranks.
        StorageError: If the folder for the compiled operators cannot be written.
    """
    import torch

    if kind == "cpu" or offload:
        from torch.utils.cpp_extension import get_default_build_root

        check_toolchain(os.environ, Path(get_default_build_root()))
    if kind != "cuda":
        return
    if not torch.cuda.is_available():
        raise MachineError(
            f"this machine has a GPU, but torch {torch.__version__} cannot use it",
            allowed="a CUDA build of torch and a driver that fits it",
            action="install one (docs/how-to/install.md), or set DS_ACCELERATOR=cpu to run on the CPU",
        )
    if torch.cuda.device_count() < world.local_size and world.launcher != "slurm":
        raise MachineError(
            f"{world.local_size} ranks on this machine, but torch sees {torch.cuda.device_count()} GPUs",
            allowed="one rank a GPU",
            action=f"start at most {torch.cuda.device_count()} ranks (deepspeed --num_gpus N)",
        )


_SOURCE = "#include <Python.h>\n#include <omp.h>\n#include <cstddef>\n"
_TIMEOUT_S = 120.0
_OPERATORS = {"cpu_adam", "deepspeed_shm_comm", "async_io", "fused_adam"}
_LONGEST_BUILD_S = 1800.0
"""An older lock is of a killed build; torch would wait for it without end."""


def check_toolchain(environ: Mapping[str, str], default_folder: Path) -> None:
    """Compile three lines like torch's extension builder, and write to its folder.

    CXX names the compiler, TORCH_EXTENSIONS_DIR the folder, which is `default_folder` otherwise.

    Raises:
        MachineError: If the compiler is missing, or cannot compile for this Python, a build was killed before, or the
            folder is mounted noexec.
        StorageError: If the folder cannot be written.
    """
    _check_compiler(environ)
    folder = Path(environ.get("TORCH_EXTENSIONS_DIR") or default_folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        no_execution = os.statvfs(folder).f_flag & os.ST_NOEXEC
    except OSError as error:
        reason = (error.strerror or "no reason given").lower()
        raise StorageError(
            f"{folder} cannot be written: {reason}; DeepSpeed builds its CPU operators there",
            allowed="a folder that can be made and written",
            action="set TORCH_EXTENSIONS_DIR to one, then rerun the same command",
        ) from None
    if no_execution:
        raise MachineError(
            f"{folder} is on a file system that is mounted noexec; DeepSpeed builds and loads its CPU operators there",
            allowed="a folder on a file system without noexec",
            action="set TORCH_EXTENSIONS_DIR to one, then rerun the same command",
        )
    _check_locks(folder)


def noexec_notes(environ: Mapping[str, str]) -> list[str]:
    """A note for the plan if the folder of the builds is on a file system that runs no programs; imports no torch."""
    named = environ.get("TORCH_EXTENSIONS_DIR") or environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(named).expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.statvfs(there).f_flag & os.ST_NOEXEC:
        return []
    return [
        f"{folder} is mounted noexec: to run on a CPU or with offload here, set TORCH_EXTENSIONS_DIR to another one"
    ]


def _check_locks(folder: Path) -> None:
    for lock in sorted(folder.rglob("lock")):
        with suppress(FileNotFoundError):  # a build that has just ended
            if lock.parent.name in _OPERATORS and time.time() - lock.stat().st_mtime > _LONGEST_BUILD_S:
                raise MachineError(
                    f"{lock} is of a killed build of DeepSpeed's {lock.parent.name}: torch would wait for it without "
                    "end",
                    allowed="no lock, or that of a build in progress",
                    action=f"rm {shlex.quote(str(lock))}",
                )


def _check_compiler(environ: Mapping[str, str]) -> None:
    named = environ.get("CXX", "c++")
    try:
        command = shlex.split(named)
    except ValueError:
        command = []
    options = ["-x", "c++", "-std=c++17", "-fPIC", "-shared", "-fopenmp", f"-I{sysconfig.get_path('include')}"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [*command, *options, "-", "-o", f"{folder}/probe.so"],
                input=_SOURCE,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TIMEOUT_S,
                check=False,
            )
        except (OSError, IndexError, subprocess.TimeoutExpired) as error:
            reason = (isinstance(error, OSError) and error.strerror) or "it does not start"
            raise _no_compiler(f"no C++ compiler found ({named}): {reason.lower()}") from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        first = next((line for line in lines if "error" in line), lines[0] if lines else f"exit code {done.returncode}")
        raise _no_compiler(f"the C++ compiler ({named}) does not work: {first}")


def _no_compiler(problem: str) -> MachineError:
    return MachineError(
        f"{problem}; DeepSpeed builds its CPU operators on first use",
        allowed="g++ or clang++ with OpenMP and Python's headers: c++ on the PATH, or named by CXX",
        action="install it (Debian: apt-get install g++ python3-dev), or set CXX; then rerun the same command",
    )
