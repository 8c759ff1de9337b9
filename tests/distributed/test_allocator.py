"""glibc keeps freed memory, unless the user has other settings."""

import platform
import subprocess
import sys

import pytest

from inheritune_ds.distributed.environment import keep_freed_memory

ON_GLIBC = platform.libc_ver()[0] == "glibc"
_RESIDENT = """
import sys
import torch
from inheritune_ds.distributed.environment import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory({})
def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) // 256
before = resident_mib()
tensor = torch.ones(64 * 2**20)
del tensor
print(resident_mib() - before)
"""


@pytest.mark.skipif(not ON_GLIBC, reason="another C library")
def test_settings_of_the_user_stay() -> None:
    own = {"MALLOC_ARENA_MAX": "2", "GLIBC_TUNABLES": "glibc.malloc.check=3", "LD_PRELOAD": "libjemalloc.so"}
    for name, value in own.items():
        assert keep_freed_memory({name: value}) == f"as the environment sets it ({name})"


@pytest.mark.skipif(not ON_GLIBC, reason="another C library")
def test_freed_tensors_stay_resident() -> None:
    def growth_mib(mode: str) -> int:
        done = subprocess.run([sys.executable, "-c", _RESIDENT, mode], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert growth_mib("leave") < 64
    assert growth_mib("keep") > 192  # of 256


def test_another_c_library_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory({}) == "the C library's own behavior (it is not glibc)"
