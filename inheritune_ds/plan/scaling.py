"""Seconds of a step, tokens a second and scaling, from FLOPs, a rate and what the ranks send.

A step is its FLOPs at the rate that one GPU reaches (MFU x peak; optimizer and logging are in that MFU) and, after
that, its communication. Only ZeRO-3 with overlap_comm gathers weights beside the passes: there communication counts
as far as it takes longer than two thirds of them, the share that the backward pass has. Strong scaling shares the
recipe's batch among the GPUs; weak scaling gives every GPU what one has at the planned number of ranks.
"""

from dataclasses import dataclass, replace

from inheritune_ds.config.model import Shape
from inheritune_ds.config.zero import ZeroSettings
from inheritune_ds.plan.communication import Link, Transfer, transfers
from inheritune_ds.plan.gpus import GPUS_A_NODE, Gpu
from inheritune_ds.plan.model_size import flops_per_token, tensors

SCALES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Numbers of GPUs that a plan tells the scaling for."""
_BACKWARD_SHARE = 2 / 3


def predict_step_s(*, flops_a_rank: float, flops_per_s: float, communication_s: float, optimizer_s: float) -> float:
    """Seconds of one optimizer step.

    Args:
        flops_a_rank: Of all micro-steps of one rank, as `budget.flops_per_token` counts them.
        flops_per_s: What one rank reaches in its forward and backward passes.
        communication_s: Time in which nothing is computed.
        optimizer_s: Update of a rank's share, clipping, logging.
    """
    return flops_a_rank / flops_per_s + communication_s + optimizer_s


def link_between(card: Gpu, gpus: int) -> Link:
    """The slowest link among a number of GPUs: within a node, or across nodes."""
    if gpus <= GPUS_A_NODE:
        return Link(card.node_gb_per_s * 1e9)
    return Link(min(card.node_gb_per_s, card.network_gb_per_s) * 1e9)


@dataclass(frozen=True)
class Job:
    """One step of a target, however many GPUs share it.

    Attributes:
        shape: The architecture.
        num_blocks: Transformer blocks.
        layout: How DeepSpeed lays it out at the planned number of ranks.
        micro_batch_size: Sequences a rank holds at once.
        accumulation: Micro-steps a step at the planned number of ranks.
        batch_windows: Sequences of a whole step.
    """

    shape: Shape
    num_blocks: int
    layout: ZeroSettings
    micro_batch_size: int
    accumulation: int
    batch_windows: int

    def transfers(self, gpus: int, accumulation: int) -> tuple[Transfer, ...]:
        """What a step sends on a number of GPUs."""
        layout: ZeroSettings = {**self.layout, "world_size": gpus}
        return transfers(tensors(self.shape, self.num_blocks), layout, accumulation=accumulation)

    def compute_s(self, windows: int, card: Gpu, mfu: float) -> float:
        """Seconds that one GPU computes for a number of its windows."""
        tokens = windows * self.layout["seq_len"]
        flops = flops_per_token(self.shape, self.num_blocks, self.layout["seq_len"])
        return tokens * flops / (card.peak_bf16_flops * mfu)

    def exposed_s(self, gpus: int, accumulation: int, card: Gpu, compute_s: float) -> float:
        """Seconds of communication in which a GPU computes nothing."""
        sent = link_between(card, gpus).seconds(self.transfers(gpus, accumulation), gpus)
        if self.layout["zero_stage"] == 3 and self.layout.get("overlap_comm", False):
            return max(0.0, sent - _BACKWARD_SHARE * compute_s)
        return sent

    def cut(self, gpus: int) -> tuple[int, int] | None:
        """Micro-batch and accumulation of the recipe's batch on a number of GPUs; None if they cannot share it."""
        if self.batch_windows % gpus:
            return None
        share = self.batch_windows // gpus
        size = next(size for size in range(min(self.micro_batch_size, share), 0, -1) if share % size == 0)
        return size, share // size


@dataclass(frozen=True)
class Scaled:
    """One number of GPUs; rates are tokens a second of each GPU, efficiencies compare them with one GPU alone.

    Attributes:
        gpus: How many.
        cut: Micro-batch and accumulation of the recipe's batch; None if it cannot be shared.
        strong_s: Communication of a step of the recipe's batch.
        strong_rate: With the recipe's batch; None as above.
        strong_efficiency: The same, compared with one GPU.
        weak_rate: With as much a GPU as planned.
        weak_efficiency: The same, compared with one GPU.
    """

    gpus: int
    cut: tuple[int, int] | None
    strong_s: float | None
    strong_rate: float | None
    strong_efficiency: float | None
    weak_rate: float
    weak_efficiency: float


def scaled(job: Job, card: Gpu, mfu: float, gpus: int) -> Scaled:
    """Strong and weak scaling on one number of GPUs.

    Args:
        job: The step.
        card: The GPU model.
        mfu: Share of its peak (0 to 1) that one GPU alone reaches.
        gpus: How many.
    """
    weak, weak_efficiency, _ = _rate(job, card, mfu, gpus, (job.micro_batch_size, job.accumulation))
    cut = job.cut(gpus)
    if cut is None:
        return Scaled(gpus, None, None, None, None, weak, weak_efficiency)
    strong, efficiency, sent = _rate(job, card, mfu, gpus, cut)
    return Scaled(gpus, cut, sent, strong, efficiency, weak, weak_efficiency)


def _rate(job: Job, card: Gpu, mfu: float, gpus: int, cut: tuple[int, int]) -> tuple[float, float, float]:
    """Tokens a second of each GPU, efficiency, and exposed communication a step, in seconds."""
    size, accumulation = cut
    computing = job.compute_s(size * accumulation, card, mfu)
    exposed = job.exposed_s(gpus, accumulation, card, computing)
    tokens = size * accumulation * job.layout["seq_len"]
    return tokens / (computing + exposed), computing / (computing + exposed), exposed


def sent_gb(job: Job, gpus: int, zero_stage: int | None = None) -> float:
    """GB that each rank sends in a step.

    Args:
        job: The step.
        gpus: Ranks.
        zero_stage: Another stage than the job's.
    """
    layout: ZeroSettings = {**job.layout, "zero_stage": job.layout["zero_stage"] if zero_stage is None else zero_stage}
    parts = replace(job, layout=layout).transfers(gpus, job.accumulation)
    return sum(part.wire_bytes(gpus) for part in parts) / 1e9
