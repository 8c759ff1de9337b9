"""Seconds per step, tokens per second and scaling, from FLOPs, a rate and the communication.

A step is its FLOPs at the rate of one GPU (MFU x peak; the MFU includes optimizer and logging), followed by its
communication. Only ZeRO-3 with overlap_comm gathers weights during the passes: there only the communication beyond
two thirds of the passes counts, the share of the backward pass. Strong scaling splits the recipe's batch among the
GPUs; weak scaling keeps the batch per GPU of the planned number of ranks.
"""

from dataclasses import dataclass, replace

from inheritune_ds.config.model import Shape
from inheritune_ds.config.zero import ZeroSettings
from inheritune_ds.plan.communication import Link, Transfer, transfers
from inheritune_ds.plan.gpus import GPUS_A_NODE, Gpu
from inheritune_ds.plan.model_size import flops_per_token, tensors

SCALES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Numbers of GPUs in the scaling table."""
_BACKWARD_SHARE = 2 / 3


def link_between(card: Gpu, gpus: int) -> Link:
    """The slowest link: within a node, or across nodes."""
    if gpus <= GPUS_A_NODE:
        return Link(card.node_gb_per_s * 1e9)
    return Link(min(card.node_gb_per_s, card.network_gb_per_s) * 1e9)


@dataclass(frozen=True)
class Job:
    """One step of a target, on any number of GPUs.

    Attributes:
        layout: DeepSpeed's, at the planned number of ranks.
        micro_batch_size: Sequences per rank and micro-step.
        accumulation: Micro-steps per step, at the planned number of ranks.
        batch_windows: Sequences per step, over all ranks.
    """

    shape: Shape
    num_blocks: int
    layout: ZeroSettings
    micro_batch_size: int
    accumulation: int
    batch_windows: int

    def transfers(self, gpus: int, accumulation: int) -> tuple[Transfer, ...]:
        """Communication of a step on a number of GPUs."""
        layout: ZeroSettings = {**self.layout, "world_size": gpus}
        return transfers(tensors(self.shape, self.num_blocks), layout, accumulation=accumulation)

    def compute_s(self, windows: int, card: Gpu, mfu: float) -> float:
        """Seconds of computation for a number of windows on one GPU."""
        tokens = windows * self.layout["seq_len"]
        flops = flops_per_token(self.shape, self.num_blocks, self.layout["seq_len"])
        return tokens * flops / (card.peak_bf16_flops * mfu)

    def exposed_s(self, gpus: int, accumulation: int, card: Gpu, compute_s: float) -> float:
        """Seconds of communication without computation."""
        sent = link_between(card, gpus).seconds(self.transfers(gpus, accumulation), gpus)
        if self.layout["zero_stage"] == 3 and self.layout.get("overlap_comm", False):
            return max(0.0, sent - _BACKWARD_SHARE * compute_s)
        return sent

    def cut(self, gpus: int) -> tuple[int, int] | None:
        """Micro-batch and accumulation of the recipe's batch on a number of GPUs; None if it does not divide."""
        if self.batch_windows % gpus:
            return None
        share = self.batch_windows // gpus
        size = next(size for size in range(min(self.micro_batch_size, share), 0, -1) if share % size == 0)
        return size, share // size


@dataclass(frozen=True)
class Scaled:
    """Scaling to one number of GPUs; rates are tokens per second and GPU, efficiencies relative to one GPU.

    Attributes:
        cut: Micro-batch and accumulation of the recipe's batch; None if it does not divide, like all `strong_` values.
        strong_s: Communication per step, in seconds.
    """

    gpus: int
    cut: tuple[int, int] | None
    strong_s: float | None
    strong_rate: float | None
    strong_efficiency: float | None
    weak_rate: float
    weak_efficiency: float


def scaled(job: Job, card: Gpu, mfu: float, gpus: int) -> Scaled:
    """Strong and weak scaling to one number of GPUs; `mfu` is the share (0 to 1) of the peak on one GPU alone."""
    weak, weak_efficiency, _ = _rate(job, card, mfu, gpus, (job.micro_batch_size, job.accumulation))
    cut = job.cut(gpus)
    if cut is None:
        return Scaled(gpus, None, None, None, None, weak, weak_efficiency)
    strong, efficiency, sent = _rate(job, card, mfu, gpus, cut)
    return Scaled(gpus, cut, sent, strong, efficiency, weak, weak_efficiency)


def _rate(job: Job, card: Gpu, mfu: float, gpus: int, cut: tuple[int, int]) -> tuple[float, float, float]:
    """Tokens per second and GPU, efficiency, and exposed communication per step in seconds."""
    size, accumulation = cut
    computing = job.compute_s(size * accumulation, card, mfu)
    exposed = job.exposed_s(gpus, accumulation, card, computing)
    tokens = size * accumulation * job.layout["seq_len"]
    return tokens / (computing + exposed), computing / (computing + exposed), exposed


def sent_gb(job: Job, gpus: int, zero_stage: int | None = None) -> float:
    """GB that each rank sends per step, with the job's ZeRO stage or another one."""
    layout: ZeroSettings = {**job.layout, "zero_stage": job.layout["zero_stage"] if zero_stage is None else zero_stage}
    parts = replace(job, layout=layout).transfers(gpus, job.accumulation)
    return sum(part.wire_bytes(gpus) for part in parts) / 1e9
