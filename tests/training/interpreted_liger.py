"""Importing this lets Triton's interpreter run Liger's norm: float arguments, and a square root that is not CUDA's."""

from typing import Any

import numpy as np
import triton
from liger_kernel.ops import rms_norm
from triton import language as tl
from triton.runtime import interpreter

_convert = interpreter._implicit_cvt


def _convert_floats(given: Any) -> Any:
    if not isinstance(given, float):
        return _convert(given)
    return tl.tensor(interpreter.TensorHandle(np.array([given], dtype=np.float32), tl.float32), tl.float32)


@triton.jit
def _rsqrt(given):  # type: ignore[no-untyped-def]  # Triton reads annotations as types of its own
    return 1.0 / tl.sqrt(given)


interpreter._implicit_cvt = _convert_floats
rms_norm.rsqrt = _rsqrt
