"""ds_configs/a6000.json on a larger GPU of which it may use as much as an A6000 has."""

from dataclasses import replace
from typing import Any

from benchmarks.gpu_parts.case import Cases
from benchmarks.gpu_parts.part import Part
from benchmarks.gpu_parts.throughput import TARGET, case_of

USABLE_GIB = 46.0
"""Of an RTX A6000's 48 GiB: the rest is CUDA's context and the driver's share."""
SUMS = ("fp32", "bf16")
SIZES = (4, 8, 16, 32)


def capped(part: Part) -> None:
    """The unchanged config makes real steps; then the micro-batches that fit, for both types of the sums."""
    cases = Cases(part)
    timing = part.sized({"warmup_steps": 2, "blocks": 5, "block_steps": 1}, {})
    own = case_of(part, TARGET, micro_batch=None, ds_config="a6000.json", cap_gib=USABLE_GIB, **timing)
    shipped = cases.measure(own, apart=True)
    if shipped is None:
        return
    part.report.bar(
        "steps of a6000.json as it stands", shipped.steps, at_least=own.blocks * own.block_steps, of_gpu=False
    )
    part.report.bar("reserved GiB of a6000.json", shipped.reserved_gib, at_most=USABLE_GIB)
    part.report.line(f"a6000.json, unchanged: {shipped.words()}")
    fit: dict[str, Any] = {}
    for sums in SUMS:
        fit[sums] = {str(shipped.micro_batch): True} if sums == "fp32" and not shipped.out_of_memory else {}
        for size in part.sized(SIZES, ()):
            document = {"data_types": {"grad_accum_dtype": sums}}
            case = replace(own, name=f"{sums}-sums-x{size}", micro_batch=size, step_windows=2 * size)
            found = cases.measure(replace(case, document=document, warmup_steps=1, blocks=1))
            if found is None:
                break
            fit[sums][str(size)] = not found.out_of_memory
            part.report.figure("micro-batches that fit, by type of the gradient sums", fit)
            if found.out_of_memory:
                break
