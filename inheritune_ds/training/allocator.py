"""The C allocator of a CPU run: keep freed memory instead of giving it back and asking for it again.

By default glibc maps every large tensor anew and returns it when it is freed; the kernel then zeroes its pages at the
next use. Keeping the memory made steps 1.16 to 1.28 times as fast (docs/performance.md).
"""

import ctypes
import os
import platform
from collections.abc import Mapping

# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 256 * 2**20


def keep_freed_memory(environ: Mapping[str, str] = os.environ) -> str:
    """Tell glibc to keep what is freed, unless the user has settings of their own.

    Args:
        environ: MALLOC_..., GLIBC_TUNABLES and LD_PRELOAD are looked for.

    Returns:
        What was done, in words.
    """
    if platform.libc_ver()[0] != "glibc":
        return "the C library's own behaviour (it is not glibc)"
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
