"""MFU, tokens/s and memory of the three targets that something was promised for."""

from dataclasses import replace
from typing import Any

from benchmarks.gpu_parts.case import Case, Cases, Trained
from benchmarks.gpu_parts.part import Part
from benchmarks.side_by_side import TOY
from inheritune_ds.config.loading import load_recipe
from inheritune_ds.plan.machine import detect_gpus
from inheritune_ds.plan.shapes import target_shape

MEMORY_RATIO = 0.95
"""Share of the GPU's memory that the planner may fill."""
TARGET, MEDIUM, LARGE = "llama-1.8b-13l", "gpt2-medium-16l", "gpt2-large-18l"
BARS = {TARGET: 0.55, MEDIUM: 0.50, LARGE: 0.54}
"""MFU at least, of the best micro-batch."""
STEP_WINDOWS = {TARGET: 64, MEDIUM: 384, LARGE: 384}
"""The recipes' own: 131,072 and 393,216 tokens."""
SURE_TO_FIT = {TARGET: 16, MEDIUM: 48, LARGE: 48}
"""Start of a sweep without a result for the planner's micro-batch; for a GPU of 80 GiB and more."""
_LARGE_SIZES = {"hidden_size": 1280, "num_attention_heads": 20, "num_hidden_layers": 18}


def shape_of(name: str) -> dict[str, Any]:
    """The shape of a target, from the shipped recipes; GPT-2 large's 18 blocks are medium's in another size."""
    recipe = load_recipe("openllama-3b-13l" if name == TARGET else "gpt2-medium-16l")
    found = target_shape(recipe)
    assert found is not None  # shipped recipes name their shapes
    shape = {**found[0].model_dump(exclude_none=True), "num_hidden_layers": found[1]}
    return {**shape, **_LARGE_SIZES} if name == LARGE else shape


def case_of(part: Part, name: str, **settings: Any) -> Case:
    """A target as a case, at toy size in a rehearsal."""
    shape = shape_of(name)
    if part.rehearse:
        shape |= {**TOY, **({"intermediate_size": 48} if "intermediate_size" in shape else {})}
    timing = part.sized({}, {"warmup_steps": 1, "blocks": 2, "block_steps": 1})
    given: dict[str, Any] = {"step_windows": STEP_WINDOWS[name], "micro_batch": "auto", **timing}
    given["memory_gib"] = usable_gib(part)
    given |= settings
    if part.rehearse:
        given["step_windows"] = 4
        if isinstance(given["micro_batch"], int):
            given["micro_batch"] = 2
    return Case(name=name, shape=shape, device=part.device, **given)


def usable_gib(part: Part) -> float | None:
    """Memory of this GPU for the planner; None in a rehearsal."""
    return None if part.rehearse else MEMORY_RATIO * detect_gpus()[0].memory_gib


def mfu_target(part: Part) -> None:
    """The 13-block target of OpenLLaMA-3B at 2048 tokens."""
    _sweep(part, (TARGET,), divisors=(2, 4))


def mfu_gpt2(part: Part) -> None:
    """GPT-2 medium's first 16 blocks and large's first 18 at 1024 tokens."""
    _sweep(part, (MEDIUM, LARGE), divisors=(2,))


def _sweep(part: Part, names: tuple[str, ...], divisors: tuple[int, ...]) -> None:
    """The planner's largest micro-batch of each target, then smaller ones; the best is judged after each."""
    cases, tried, largest = Cases(part), {name: list[Trained]() for name in names}, dict[str, int]()
    for divisor in (1, *part.sized(divisors, divisors[:1])):
        for name, before in tried.items():
            case = case_of(part, name)
            if divisor > 1:
                size, rest = divmod(largest[name], divisor)
                if rest:
                    continue
                case = replace(case, micro_batch=size, name=f"{name}-x{size}")
            found = cases.measure(case)
            if divisor == 1:
                largest[name] = SURE_TO_FIT[name] if found is None else found.micro_batch
            if found is not None:
                before.append(found)
                _judge(part, name, before)
    if nothing := [name for name, before in tried.items() if all(one.out_of_memory for one in before)]:
        part.report.fail(f"no micro-batch that was tried has a rate: {', '.join(nothing)}")


def _judge(part: Part, name: str, cases: list[Trained]) -> None:
    fitting = [one for one in cases if not one.out_of_memory]
    if not fitting:
        return
    best = max(fitting, key=lambda one: one.tokens_per_s["median"])
    part.report.figure(f"best micro-batch of {name}", best.micro_batch)
    part.report.bar(f"{name} MFU", best.mfu, at_least=BARS[name])
    part.report.bar(f"{name} recompiles after warm-up", best.recompiles, at_most=0)
    part.report.bar(f"{name} code that the compiler left eager", best.left_eager, at_most=0)
    part.report.bar(f"{name} host syncs a micro-step", best.syncs_per_micro_step, at_most=0)
    if best.mfu is None and not part.rehearse:
        part.report.line(f"{name}: no MFU, the peak of this GPU is not known (inheritune_ds/plan/gpus.py)")
