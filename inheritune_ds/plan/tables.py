"""The tables of a plan: memory, hours, communication, scaling."""

import textwrap
from collections.abc import Iterator, Sequence

from inheritune_ds.config.zero import ZeroSettings
from inheritune_ds.errors import RecipeError
from inheritune_ds.plan.budget import Budget
from inheritune_ds.plan.claims import MFU_CONVENTION
from inheritune_ds.plan.gpus import GPUS_A_NODE, Gpu, hours
from inheritune_ds.plan.memory import largest_micro_batch, memory
from inheritune_ds.plan.model_size import hardware_flops_per_token
from inheritune_ds.plan.scaling import SCALES, Job, Scaled, link_between, scaled, sent_gb

WIDTH = 110
UNKNOWN_MODEL = "unknown until the reference is read"
UNKNOWN_CORPUS = "unknown until the corpus is tokenized"


def wrap(first: str, text: str, indent: int | None = None) -> str:
    """Wrap to `WIDTH`, indenting the lines after the first by `indent` or the length of `first`."""
    rest = " " * (len(first) if indent is None else indent)
    return textwrap.fill(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def memory_lines(budget: Budget, card: Gpu) -> Iterator[str]:
    """Parts of one GPU's memory at the two worst moments, the largest micro-batch, and advice on the ZeRO stage."""
    if budget.memory is None or budget.job is None:
        yield UNKNOWN_MODEL
        return
    moments, layout = (budget.memory.backward, budget.memory.update), budget.layout
    yield f"{'GiB':<28}{'backward pass':>14}{'update':>10}"
    for part in [*dict.fromkeys(part for moment in moments for part in moment if part != "margin"), "margin"]:
        sizes = [f"{moment[part]:.2f}" if part in moment else "-" for moment in moments]
        yield f"{part:<28}{sizes[0]:>14}{sizes[1]:>10}"
    totals = [sum(moment.values()) for moment in moments]
    kernels = f"{layout.get('activation_checkpointing', 'none')} recomputed, {layout.get('loss', 'chunked')} loss"
    yield (
        f"{'total':<28}{totals[0]:>14.2f}{totals[1]:>10.2f}   ZeRO-{layout['zero_stage']}, {layout['precision']}, "
        f"ranks: {layout['world_size']}; {kernels}"
    )
    if budget.memory.host_gib:
        yield f"{'on the host, per rank':<28}{budget.memory.host_gib:>14.2f}"
    yield wrap("", _largest(budget.job, card))
    advice = _stage_advice(budget.job, card)
    if advice:
        yield wrap("", advice)


def _largest(job: Job, card: Gpu) -> str:
    """The largest micro-batch for each type of the gradient sums."""
    found = []
    for fp32_sums in (True, False) if job.layout["precision"] == "bf16" else (job.layout["accumulate_fp32"],):
        layout: ZeroSettings = {**job.layout, "accumulate_fp32": fp32_sums}
        try:
            size = largest_micro_batch(
                job.shape, job.num_blocks, memory_gib=card.memory_gib, batch_windows=job.batch_windows, **layout
            )
            found.append(str(size))
        except RecipeError:
            found.append("none")
    if len(found) > 1:
        found = [f"{found[0]} with gradients summed in fp32", f"{found[1]} with gradients summed in bf16"]
    return f"Largest micro-batch in {card.memory_gib:.0f} GiB ({card.label}): {', '.join(found)}."


def _stage_advice(job: Job, card: Gpu) -> str:
    """Advise ZeRO-1 wherever it fits: the others reduce gradients in every micro-step."""
    stage = job.layout["zero_stage"]
    if stage == 1:
        return ""
    first: ZeroSettings = {**job.layout, "zero_stage": 1, "offload_parameters": False, "offload_optimizer": False}
    sizes = {"micro_batch_size": job.micro_batch_size, "accumulation": job.accumulation}
    need = memory(job.shape, job.num_blocks, **sizes, **first).total_gib
    if need > card.memory_gib:
        return f"ZeRO-1 without offload would need {need:.1f} GiB."
    return (
        f"ZeRO-1 without offload also fits ({need:.1f} GiB) and reduces gradients once per step: use "
        "ds_configs/zero1.json."
    )


def hours_lines(budget: Budget, cards: Sequence[Gpu], mfu: float) -> Iterator[str]:
    """Tokens per second, hours and the floor on each GPU model."""
    job = budget.job
    ranks, recomputation = budget.layout["world_size"], budget.layout.get("activation_checkpointing", "none")
    least = budget.floor_flops(recomputation)
    if least is None or budget.flops is None or budget.flops_a_token is None or job is None:
        yield UNKNOWN_MODEL if budget.flops_a_token is None else UNKNOWN_CORPUS
        return
    hardware = hardware_flops_per_token(job.shape, job.num_blocks, job.layout["seq_len"], recomputation)
    if mfu * hardware > budget.flops_a_token:
        raise RecipeError(
            f"MFU {mfu} is {mfu * hardware / budget.flops_a_token:.0%} of the peak when activations are recomputed",
            allowed=f"at most {budget.flops_a_token / hardware:.2f} with activation_checkpointing {recomputation}",
            action="give a smaller --mfu",
        )
    share = f"at {mfu * 100:g} % MFU"
    yield f"{'GPU':<24}{'tokens/s':>12}{share:>16}{'floor (100 %)':>16}{'GPU-hours':>12}   memory"
    for card in cards:
        alone = hours(budget.flops, card, ranks, mfu)
        at = scaled(job, card, mfu, ranks)
        planned = alone / (at.strong_efficiency or at.weak_efficiency)
        floor = hours(least, card, ranks, 1.0)
        need = budget.memory.total_gib if budget.memory else 0.0
        verdict = "fits" if need <= card.memory_gib else "does not fit"
        rate = f"{(at.strong_rate or at.weak_rate) * ranks:,.0f}"
        yield (
            f"{f'{ranks} x {card.label}':<24}{rate:>12}{_hours(planned):>16}{_hours(floor):>16}"
            f"{_hours(planned * ranks):>12}   {need:.1f} of {card.memory_gib:.0f} GiB: {verdict}"
        )
    yield wrap("", f"{MFU_CONVENTION}.")
    if hardware > budget.flops_a_token:
        yield wrap(
            "",
            f"Activations are recomputed: {hardware / 1e9:.4g} GFLOP per token, so that {mfu * 100:g} % MFU is "
            f"{mfu * hardware / budget.flops_a_token * 100:.0f} % HFU. The floor includes them.",
        )
    if budget.layout["offload_optimizer"] or budget.layout["offload_parameters"]:
        yield "Offload: these figures do not include transfers to and from host memory and Adam on the CPU."
    if budget.layout["precision"] == "fp32":
        yield "The rates are bf16 peaks; this config computes in fp32, which takes longer. No rate is known for a CPU."


def _hours(value: float) -> str:
    return f"{value:,.1f}" if value >= 0.1 else "under 0.1"


def communication_lines(budget: Budget, card: Gpu) -> Iterator[str]:
    """Bytes that each rank sends per step, their time, and the price of accumulation with ZeRO-2 and 3."""
    job, ranks = budget.job, budget.layout["world_size"]
    if job is None or ranks == 1:
        return
    link = link_between(card, ranks)
    yield f"{'what':<12}{'collective':<16}{'calls':>8}{'GB per rank':>16}{'ms':>10}"
    sent = job.transfers(ranks, job.accumulation)
    for part in sent:
        yield (
            f"{part.what:<12}{part.collective:<16}{part.calls:>8,}{part.wire_bytes(ranks) / 1e9:>16.3f}"
            f"{link.seconds([part], ranks) * 1e3:>10.1f}"
        )
    total, gb = link.seconds(sent, ranks) * 1e3, sum(part.wire_bytes(ranks) for part in sent) / 1e9
    yield f"{'total':<36}{gb:>16.3f}{total:>10.1f}   {_link_words(card, ranks)}"
    stage = job.layout["zero_stage"]
    if stage > 1 and job.accumulation > 1:
        once = sent_gb(job, ranks, zero_stage=1)
        yield wrap(
            "",
            f"ZeRO-{stage} reduces gradients in each of the {job.accumulation} micro-steps: {gb:.3f} GB per step, "
            f"where ZeRO-1 sends {once:.3f} GB. A larger micro-batch, or ZeRO-1 if it fits, sends less.",
        )


def _link_words(card: Gpu, gpus: int) -> str:
    where = "within a node" if gpus <= GPUS_A_NODE else "across nodes"
    link = link_between(card, gpus)
    return f"{link.bytes_per_s / 1e9:.0f} GB/s {where}, {link.latency_s * 1e6:.0f} us per message"


def scaling_lines(budget: Budget, card: Gpu, mfu: float) -> Iterator[str]:
    """Tokens per second and GPU for 1 to 512 GPUs, with the recipe's batch and with a growing batch."""
    job = budget.job
    if job is None:
        return
    yield wrap(
        "",
        f"{card.label} at {mfu * 100:g} % MFU on one GPU; {_link_words(card, GPUS_A_NODE)}; "
        f"{_link_words(card, GPUS_A_NODE + 1)}. Computed, not measured. Exposed: communication that the "
        "passes do not hide.",
    )
    recipe = f"the recipe's {job.batch_windows} windows per step"
    yield f"{recipe:^57}{f'{job.micro_batch_size * job.accumulation} windows on each GPU':^33}".rstrip()
    head = f"{'GPUs':>4}{'windows':>11}{'exposed ms':>12}"
    yield f"{head}{'tokens/s/GPU':>15}{'efficiency':>13}{'tokens/s/GPU':>18}{'efficiency':>13}"
    for gpus in SCALES:
        yield _scaling_line(scaled(job, card, mfu, gpus))


def _scaling_line(at: Scaled) -> str:
    weak = f"{at.weak_rate:>18,.0f}{at.weak_efficiency * 100:>11.1f} %"
    if at.cut is None or at.strong_s is None or at.strong_rate is None or at.strong_efficiency is None:
        return f"{at.gpus:>4}{'cannot be shared evenly':>51}{weak}"
    cut = f"{at.cut[0]} x {at.cut[1]}"
    return (
        f"{at.gpus:>4}{cut:>11}{at.strong_s * 1e3:>12,.1f}{at.strong_rate:>15,.0f}{at.strong_efficiency * 100:>11.1f} %"
        f"{weak}"
    )
