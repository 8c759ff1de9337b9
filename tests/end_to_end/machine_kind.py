"""What decides the last bit of a CPU result: the processor as the kernel describes it, and torch's build."""

import hashlib
from pathlib import Path

import torch

FIELDS = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")


def machine_kind() -> dict[str, str]:
    """Processor, its flags' hash, torch version and the instruction set torch uses."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    found = {key: values.get(key, "") for key in FIELDS}
    found["flags"] = hashlib.sha256(" ".join(sorted(found["flags"].split())).encode()).hexdigest()[:16]
    return {**found, "torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}
