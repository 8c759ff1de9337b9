"""Peak memory of this rank: of its GPU, or of the process without one."""

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory_gib() -> float:
    """Peak in GiB: GPU memory allocated, or the process's resident memory, since the start or the last reset."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    with suppress(OSError, StopIteration):  # not Linux
        lines = _STATUS.read_text(encoding="ascii").splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def reset_peak_memory() -> None:
    """Restart the peak from the present use, where the system can (Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        _CLEAR_REFS.write_text("5", encoding="ascii")  # proc(5): reset the peak
