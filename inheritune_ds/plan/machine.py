"""Detection of this machine without torch: GPUs, host memory, bf16 on the CPU."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_QUERY = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
_TIMEOUT_S = 20.0
_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


@dataclass(frozen=True)
class DetectedGpu:
    """A GPU in the driver's words: its name is such as `NVIDIA RTX A6000`."""

    name: str
    memory_gib: float
    compute_capability: tuple[int, int]

    @property
    def bf16(self) -> bool:
        """Whether its tensor cores compute in bfloat16 (Ampere and newer)."""
        return self.compute_capability >= (8, 0)


def detect_gpus() -> list[DetectedGpu]:
    """Ask `nvidia-smi` for the GPUs; an empty list if it is missing, fails or does not answer."""
    try:
        answer = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    found = (_parse(line) for line in answer.stdout.splitlines())
    return [device for device in found if device is not None]


def _parse(line: str) -> DetectedGpu | None:
    """Parse a line `name, MiB, major.minor`; None for a line with `[N/A]`."""
    try:
        name, memory_mib, capability = (part.strip() for part in line.rsplit(",", 2))
        major, minor = capability.split(".")
        return DetectedGpu(name, float(memory_mib) / 1024.0, (int(major), int(minor)))
    except ValueError:
        return None


def host_memory_gib() -> float:
    """Memory of this machine in GiB, or the limit of the control group if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such control group, or "max"
            continue
    return float(total) / 2**30


def cpu_has_bf16() -> bool:
    """Whether the CPU has bfloat16 instructions; False if unknown (not Linux)."""
    try:
        text = CPUINFO.read_text(encoding="utf-8")
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return not _BF16_FLAGS.isdisjoint(flags.split())
