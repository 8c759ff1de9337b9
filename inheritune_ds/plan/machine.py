"""Detection of this machine without torch: GPUs, host memory, bf16 on the CPU."""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from inheritune_ds.config.deepspeed import Machine

CPUINFO = Path("/proc/cpuinfo")
DRIVER = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""Devices of NVIDIA's driver on Linux and under WSL."""
_FIELDS = "index,uuid,name,memory.total,memory.free,compute_cap,mig.mode.current"
_TIMEOUT_S = 20.0
_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}
# Lines of `nvidia-smi -L`: a card, then its slices, e.g. `  MIG 3g.20gb     Device  0: (UUID: MIG-...)`.
_CARD = re.compile(r"^GPU \d+: .*\(UUID: (GPU-\S+)\)")
_SLICE = re.compile(r"^\s+MIG (\S*?\.(\d+)gb\S*)\s+Device\s+\d+: \(UUID: (MIG-\S+)\)")


@dataclass(frozen=True)
class DetectedGpu:
    """A GPU, or a MIG slice of one, that CUDA may use.

    Attributes:
        name: In the driver's words, such as `NVIDIA RTX A6000`.
        memory_gib: Its whole memory.
        free_gib: What other programs leave of it.
    """

    name: str
    memory_gib: float
    compute_capability: tuple[int, int]
    free_gib: float

    @property
    def bf16(self) -> bool:
        """Whether its tensor cores compute in bfloat16 (Ampere and newer)."""
        return self.compute_capability >= (8, 0)


@dataclass(frozen=True)
class _Card:
    """A card that nvidia-smi lists, with the UUID of each device that CUDA sees on it: itself, or its MIG slices."""

    index: str
    uuid: str
    devices: Sequence[tuple[str, DetectedGpu]]


def detect_gpus(environ: Mapping[str, str] = os.environ) -> list[DetectedGpu]:
    """Ask `nvidia-smi` for the GPUs that CUDA_VISIBLE_DEVICES leaves, in CUDA's order.

    Returns:
        An empty list if it leaves none, or if nvidia-smi is missing, fails or does not answer.
    """
    cards = _cards()
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return _named(visible, cards)
    first = [card.devices[0][1] for card in cards]
    if environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        return first
    # CUDA's own order is the fastest first, by a rule that NVIDIA does not publish.
    return sorted(first, key=lambda gpu: (gpu.memory_gib, gpu.compute_capability), reverse=True)


def _cards() -> list[_Card]:
    """The cards in the order of the PCI bus; those whose facts the driver does not report are skipped."""
    cards, slices = [], None
    for line in _ask(f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"):
        try:
            index, uuid, rest = (part.strip() for part in line.split(",", 2))
            name, total_mib, free_mib, capability, mig = (part.strip() for part in rest.rsplit(",", 4))
            major, minor = capability.split(".")
            whole = DetectedGpu(name, float(total_mib) / 1024.0, (int(major), int(minor)), float(free_mib) / 1024.0)
        except ValueError:  # a line with `[N/A]`
            continue
        if mig == "Enabled":
            slices = _slices() if slices is None else slices
            devices = [(key, _slice_of(whole, profile, gb)) for key, profile, gb in slices.get(uuid, ())]
        else:
            devices = [(uuid, whole)]
        if devices:  # CUDA cannot use a card whose MIG mode is on without a slice
            cards.append(_Card(index, uuid, devices))
    return cards


def _slices() -> dict[str, list[tuple[str, str, int]]]:
    """UUID, profile and GB of the MIG slices of each card, by the card's UUID."""
    found: dict[str, list[tuple[str, str, int]]] = {}
    card = ""
    for line in _ask("-L"):
        if match := _CARD.match(line):
            card = match[1]
        elif match := _SLICE.match(line):
            found.setdefault(card, []).append((match[3], match[1], int(match[2])))
    return found


def _slice_of(card: DetectedGpu, profile: str, gb: int) -> DetectedGpu:
    """A slice; its profile names its memory in GB."""
    size_gib = gb * 1e9 / 2**30
    return DetectedGpu(f"{card.name} MIG {profile}", size_gib, card.compute_capability, size_gib)


def _named(visible: str, cards: Sequence[_Card]) -> list[DetectedGpu]:
    """The devices of CUDA_VISIBLE_DEVICES: indices in PCI order, or UUIDs that may be shortened.

    CUDA ignores the list from the first invalid entry on, and all of a list that repeats an entry.
    """
    chosen: list[tuple[str, DetectedGpu]] = []
    slices = [device for card in cards for device in card.devices if device[0].startswith("MIG-")]
    for word in (part.strip() for part in visible.split(",")):
        found = [card.devices[0] for card in cards if card.index == word or (word and card.uuid.startswith(word))]
        found += [device for device in slices if word and device[0].startswith(word)]
        if len(found) != 1:
            break
        if found[0] in chosen:
            return []
        chosen += found
    return [gpu for _, gpu in chosen]


def _ask(*arguments: str) -> list[str]:
    """The lines that nvidia-smi prints."""
    try:
        command = ["nvidia-smi", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def has_driver() -> bool:
    """Whether NVIDIA's driver is loaded, so that torch may see a GPU even where nvidia-smi is not on the PATH."""
    return any(path.exists() for path in DRIVER)


def cpu_machine(local_size: int) -> Machine:
    """One rank's share of this machine without a GPU; `local_size` is the number of its ranks."""
    return Machine("cpu", host_memory_gib() / local_size, cpu_has_bf16())


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
