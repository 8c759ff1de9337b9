"""ds_configs/a6000.json on a larger GPU of which it may use as much as an A6000 has."""

from dataclasses import replace
from typing import Any

from benchmarks.gpu_parts.case import Case, Cases
from benchmarks.gpu_parts.part import Part
from benchmarks.gpu_parts.throughput import TARGET, case_of

USABLE_GIB = 46.0
"""Of an RTX A6000's 48 GiB: the rest is CUDA's context and the driver's share."""
SUMS = ("fp32", "bf16")
SIZES = (2, 4, 8, 16)


def shipped(part: Part) -> None:
    """The unchanged config makes real steps."""
    case = _case(part)
    part.report.expect(case.name)
    found = Cases(part).measure(case, apart=True)
    if found is None:
        return
    steps = case.blocks * case.block_steps
    part.report.bar("steps of a6000.json as it stands", found.steps, at_least=steps, of_gpu=False)
    part.report.bar("reserved GiB of a6000.json", found.reserved_gib, at_most=USABLE_GIB)
    part.report.line(f"a6000.json, unchanged: {found.words()}")


def fit(part: Part) -> None:
    """The micro-batches that fit, for both types of the sums; the smallest first, up to one that does not."""
    cases, sizes = Cases(part), part.sized(SIZES, SIZES[:1])
    names = {sums: {size: f"{sums}-sums-x{size}" for size in sizes} for sums in SUMS}
    part.report.expect(*(name for named in names.values() for name in named.values()))
    fitting: dict[str, dict[str, bool]] = {}
    for sums, named in names.items():
        fitting[sums] = {}
        for size, name in named.items():
            document = {"data_types": {"grad_accum_dtype": sums}}
            case = _case(part, document=document, micro_batch=size, step_windows=2 * size)
            found = cases.measure(replace(case, name=name, warmup_steps=1, blocks=part.sized(1, 2)))
            if found is None:
                break
            fitting[sums][str(size)] = not found.out_of_memory
            part.report.figure("micro-batches that fit, by type of the gradient sums", fitting)
            if found.out_of_memory:
                part.report.done(*named.values())
                break


def _case(part: Part, **settings: Any) -> Case:
    timing = part.sized({"warmup_steps": 2, "blocks": 5, "block_steps": 1}, {})
    given = {"micro_batch": None, "ds_config": "a6000.json", "cap_gib": USABLE_GIB, **timing, **settings}
    return case_of(part, TARGET, **given)
