"""Every kernel path that works here, held against the same step in fp64 on the same device."""

from dataclasses import asdict
from typing import Any

import torch

from benchmarks import kernel_parity
from benchmarks.gpu_parts.part import Part
from inheritune_ds.errors import InherituneError

_WORDS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def llama(part: Part) -> None:
    """Gradients of a LLaMA."""
    _parity(part, "llama")


def gpt2(part: Part) -> None:
    """Gradients of a GPT-2."""
    _parity(part, "gpt2")


def _parity(part: Part, family: str) -> None:
    """Gradients of each path in each precision; the error of the worst one relative to its limit is judged."""
    missing: dict[str, str] = {}
    errors: dict[str, Any] = {}
    part.report.expect(*(f"{name}, {word}" for word in _WORDS.values() for name in kernel_parity.PATHS))
    for dtype, word in _WORDS.items():
        worst, worse = 0.0, 0
        for name, request in kernel_parity.PATHS.items():
            case = f"{name}, {word}"
            torch._dynamo.reset()  # noqa: SLF001 - no public way; a path's graphs do not count against another's limit
            try:
                found = kernel_parity.path_error(request, family, dtype)
            except InherituneError as error:
                if name not in kernel_parity.MAY_BE_MISSING:
                    raise
                missing[case] = error.problem.partition("\n")[0]
            else:
                errors[case] = asdict(found)
                part.report.figure("relative errors of gradients", errors)
                worst = max(worst, found.judged / kernel_parity.limit(request, dtype))
                worse += len(found.worse_than_eager)
                part.report.bar(f"gradients over their limit, {family}, {word}", worst, at_most=1.0, of_gpu=False)
                part.report.bar(f"tensors twice as far off as eager, {family}, {word}", worse, at_most=0, of_gpu=False)
            part.report.done(case)
    for name, why in missing.items():
        part.report.line(f"{name}: {why}")
