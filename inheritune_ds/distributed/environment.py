"""Environment variables, threads and allocator of a rank."""

import ctypes
import os
import platform
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Literal


def prepare_environment(environ: MutableMapping[str, str], *, kind: Literal["cuda", "cpu"]) -> None:
    """Set the variables that torch, its extension builder, OpenMP and the hub's client read; the user's stay."""
    # ninja is beside the interpreter when the virtual environment is not activated.
    scripts = str(Path(sys.executable).parent)
    if scripts not in environ.get("PATH", "").split(os.pathsep):
        environ["PATH"] = os.pathsep.join([scripts, environ.get("PATH", "")])
    _set_threads(environ)
    if kind == "cpu":
        environ.setdefault("DS_ACCELERATOR", "cpu")  # then DeepSpeed does not warn of a missing GPU
    else:
        _set_cuda(environ)
    if not sys.stderr.isatty():
        # Progress bars would fill a log file.
        environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _set_cuda(environ: MutableMapping[str, str]) -> None:
    """Set what CUDA and torch's allocator read when they start."""
    if "CUDA_VISIBLE_DEVICES" in environ:
        environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # its numbers are those of nvidia-smi then
    # Segments that grow leave less unused memory. The second name is the older one, of which torch warns.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & environ.keys():
        environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _set_threads(environ: MutableMapping[str, str]) -> None:
    """Share the cores among the ranks of this machine, with a short spin of waiting threads.

    On two quiet cores a step was a fifth faster with a short spin than with none (docs/explanation/performance.md).
    With libgomp's own spin, some milliseconds, it was up to ten times slower when another process was busy. Ranks with
    more threads than cores do not spin.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = int(environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks > 1:  # one rank: torch's own choice, which knows physical cores
        environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    threads = environ.get("OMP_NUM_THREADS", "1")
    crowded = not threads.isdecimal() or ranks * int(threads) > cores
    if "OMP_WAIT_POLICY" not in environ and "GOMP_SPINCOUNT" not in environ:
        # 2000 spins are tens of microseconds, about the time between two parallel regions of a step.
        environ.update({"OMP_WAIT_POLICY": "PASSIVE"} if crowded else {"GOMP_SPINCOUNT": "2000"})


# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 256 * 2**20


def keep_freed_memory(environ: Mapping[str, str] = os.environ) -> str:
    """Make glibc keep freed memory, unless `environ` has settings of an allocator; returns a text for the log."""
    if platform.libc_ver()[0] != "glibc":
        return "the C library's own behavior (it is not glibc)"
    own = sorted(
        name
        for name, value in environ.items()
        if name.startswith("MALLOC_") or (name in ("GLIBC_TUNABLES", "LD_PRELOAD") and "malloc" in value)
    )
    if own:
        return f"as the environment sets it ({', '.join(own)})"
    mallopt = ctypes.CDLL(None).mallopt
    done = mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1) and mallopt(_M_TOP_PAD, _TOP_PAD_BYTES)
    return "freed memory is kept (no pages to zero again)" if done else "glibc's default (mallopt refused)"
