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
BLOCK_STEPS = {TARGET: 2, MEDIUM: 4, LARGE: 4}
"""Steps of a timed block: a second and more on the fastest cards."""
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
        document = given.get("document", {})
        given["document"] = {**document, "kernels": {"compile": True, **document.get("kernels", {})}}
        given["step_windows"] = 4
        if isinstance(given["micro_batch"], int):
            given["micro_batch"] = 2
    return Case(name=name, shape=shape, device=part.device, **given)


def usable_gib(part: Part) -> float | None:
    """Memory of this GPU for the planner; None in a rehearsal."""
    return None if part.rehearse else MEMORY_RATIO * detect_gpus()[0].memory_gib


def mfu_target(part: Part) -> None:
    """The 13-block target of OpenLLaMA-3B at 2048 tokens."""
    _sweep(part, TARGET, divisors=(1, 2, 4))


def mfu_medium(part: Part) -> None:
    """GPT-2 medium's first 16 blocks at 1024 tokens."""
    _sweep(part, MEDIUM, divisors=(1, 2))


def mfu_large(part: Part) -> None:
    """GPT-2 large's first 18 blocks at 1024 tokens."""
    _sweep(part, LARGE, divisors=(1, 2))


def _sweep(part: Part, name: str, divisors: tuple[int, ...]) -> None:
    """The planner's largest micro-batch of a target, then smaller ones; the best is judged after each."""
    cases, tried, largest = Cases(part), list[Trained](), SURE_TO_FIT[name]
    numbered = {divisor: f"{name}-over-{divisor}" for divisor in part.sized(divisors, divisors[:2])}
    part.report.expect(*numbered.values())
    for divisor, case_name in numbered.items():
        size, rest = divmod(largest, divisor)
        if rest:
            part.report.done(case_name)
            continue
        given: dict[str, Any] = {"micro_batch": size} if divisor > 1 else {}
        case = case_of(part, name, block_steps=part.sized(BLOCK_STEPS[name], 1), **given)
        found = cases.measure(replace(case, name=case_name))
        if found is not None:
            largest = found.micro_batch if divisor == 1 else largest
            tried.append(found)
            _judge(part, name, tried)
    if all(one.out_of_memory for one in tried):
        part.report.fail(f"no micro-batch that was tried has a rate: {name}")


def _judge(part: Part, name: str, cases: list[Trained]) -> None:
    fitting = [one for one in cases if not one.out_of_memory]
    if not fitting:
        return
    best = max(fitting, key=lambda one: one.tokens_per_s["median"])
    syncs = [one.syncs_per_micro_step for one in fitting if one.syncs_per_micro_step is not None]
    part.report.figure(f"best micro-batch of {name}", best.micro_batch)
    part.report.bar(f"{name} MFU", best.mfu, at_least=BARS[name])
    part.report.bar(f"{name} graphs", best.graphs, at_least=2, of_gpu=False)  # block and loss
    part.report.bar(f"{name} host syncs a micro-step", max(syncs, default=None), at_most=0)
    if best.mfu is None and not part.rehearse:
        part.report.line(f"{name}: no MFU, the peak of this GPU is not known (inheritune_ds/plan/gpus.py)")
