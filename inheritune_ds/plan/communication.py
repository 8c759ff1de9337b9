"""Communication of one optimizer step: calls, bytes, and the time by an alpha-beta model.

Counted on DeepSpeed 0.19.8 by `python -m benchmarks.comm` and read from its source. Its ZeRO-1 and 2 do not
reduce-scatter gradients: they all-reduce them (reduce_scatter: true only selects the copied slices), so a reduction
moves twice the bytes of the ZeRO paper. Gradients, and fp32 sums too, are sent in the type of the passes unless
communication_data_type is set. Updated weights are gathered once per step. ZeRO-1 reduces once per step, ZeRO-2 and 3
in every micro-step. ZeRO-3 gathers weights in every micro-step, and twice unless it keeps them until the backward pass.

A payload is the whole tensor of a call. On n ranks a ring sends and receives (n - 1) / n of it on each rank for an
all-gather or a reduce-scatter, twice that for an all-reduce (nccl-tests, doc/PERFORMANCE.md). NCCL works like this;
gloo has no reduce-scatter, torch uses an all-reduce instead.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from inheritune_ds.config.zero import (
    PERSISTENCE_THRESHOLD,
    REDUCE_BUCKET,
    ZeroSettings,
    communication_bytes,
    element_bytes,
    uses_bf16_optimizer,
)
from inheritune_ds.plan.zero_memory import WHOLE_REDUCTION, Tensors, kept_gathered

Collective = Literal["all_reduce", "all_gather", "reduce_scatter"]
Backend = Literal["nccl", "gloo"]
LATENCY_S = 10e-6
"""Latency of one message between two ranks; assumed, for NCCL within a node and over InfiniBand alike."""
_OWN_BYTES = (2 * 8, 4 * 8)
"""The trainer's: the tokens of the batch and a flag for an id outside the vocabulary; the loss and three requests."""


@dataclass(frozen=True)
class Transfer:
    """One rank's collectives of one kind in one optimizer step; `payload_bytes` is of all calls together."""

    what: str
    collective: Collective
    calls: int
    payload_bytes: float

    def wire_bytes(self, ranks: int, backend: Backend = "nccl") -> float:
        """Bytes that each rank sends; it receives the same number."""
        doubled = self.collective == "all_reduce" or (self.collective == "reduce_scatter" and backend == "gloo")
        return (2 if doubled else 1) * (ranks - 1) / ranks * self.payload_bytes

    def messages(self, ranks: int) -> int:
        """Sequential messages: a tree for an all-reduce (up and down), a ring for the others."""
        each = 2 * math.ceil(math.log2(ranks)) if self.collective == "all_reduce" else ranks - 1
        return self.calls * each


def transfers(tensors: Tensors, layout: ZeroSettings, *, accumulation: int) -> tuple[Transfer, ...]:
    """All communication of a step of `accumulation` micro-steps; one rank sends nothing."""
    if layout["world_size"] == 1:
        return ()
    if layout["zero_stage"] == 3:
        return _stage_3(tensors, layout, accumulation)
    total = tensors.total
    weights = Transfer("weights", "all_gather", len(tensors.groups), float(element_bytes(layout["precision"]) * total))
    gradients = float(communication_bytes(layout) * total)
    if uses_bf16_optimizer(layout):
        # It adds accumulators of parameter groups to a call until the call exceeds WHOLE_REDUCTION elements.
        decayed, undecayed = tensors.groups
        calls = 1 if sum(decayed) <= WHOLE_REDUCTION or not undecayed else 2
        # One more number: the norm.
        return Transfer("gradients", "all_reduce", calls, gradients), weights, _counts(1)
    # Norms of both groups, and in half precision the overflow check.
    counts = _counts(2 if layout["precision"] == "fp32" else 3)
    if layout["zero_stage"] == 1:
        calls = _bucketed_calls([*tensors.groups[0], *tensors.groups[1]], layout) + _split_calls(tensors, layout)
        return Transfer("gradients", "all_reduce", calls, gradients), weights, counts
    calls = _bucketed_calls(tensors.sizes[::-1], layout) + _split_calls(tensors, layout)
    reduced = Transfer("gradients", "all_reduce", calls * accumulation, gradients * accumulation)
    return reduced, weights, counts


def _counts(others: int) -> Transfer:
    """Small messages: token counts, losses, norms, overflows."""
    return Transfer("counts", "all_reduce", len(_OWN_BYTES) + others, sum(_OWN_BYTES) + 4.0 * others)


def _bucketed_calls(sizes: Iterable[int], layout: ZeroSettings) -> int:
    """Calls for gradients of these sizes in this order through a bucket."""
    limit = layout.get("reduce_bucket_size", REDUCE_BUCKET)
    calls, held = 0, 0
    for size in sizes:
        if held and held + size > limit:
            calls, held = calls + 1, 0
        held += size
    return calls + (held > 0)


def _split_calls(tensors: Tensors, layout: ZeroSettings) -> int:
    """Additional calls for gradients larger than the bucket that belong to several ranks, sent slice by slice."""
    limit, ranks, calls = layout.get("reduce_bucket_size", REDUCE_BUCKET), layout["world_size"], 0
    for sizes in tensors.groups:
        share = sum(sizes) / ranks
        for start, size in zip(accumulate(sizes, initial=0), sizes, strict=False):
            ends = [share * number for number in range(1, ranks) if start < share * number < start + size]
            held = 0.0
            for before, end in zip([float(start), *ends], ends if size > limit else [], strict=False):
                held += end - before
                if held > limit:
                    calls, held = calls + 1, 0.0
    return calls


def _stage_3(tensors: Tensors, layout: ZeroSettings, accumulation: int) -> tuple[Transfer, ...]:
    threshold = layout.get("persistence_threshold", PERSISTENCE_THRESHOLD)
    element, wire = element_bytes(layout["precision"]), communication_bytes(layout)
    shared = [size for size in tensors.sizes if size > threshold]
    whole = [size for size in tensors.sizes if size <= threshold]
    # The backward pass starts with the parameters that the forward pass gathered last.
    again = [
        size
        for behind, size in zip(accumulate(shared[::-1]), shared[::-1], strict=True)
        if behind > kept_gathered(layout)
    ]
    gathered = accumulation * (sum(shared) + sum(again)) + sum(whole)
    gathers = accumulation * (len(shared) + len(again)) + len(whole)
    calls = accumulation * _bucketed_calls(tensors.sizes[::-1], layout)
    return (
        Transfer("gradients", "reduce_scatter", calls, float(accumulation * wire * tensors.total)),
        Transfer("weights", "all_gather", gathers, float(element * gathered)),
        _counts(2),
    )


@dataclass(frozen=True)
class Link:
    """The slowest link between the ranks; `bytes_per_s` is the bus bandwidth of collectives, as in nccl-tests."""

    bytes_per_s: float
    latency_s: float = LATENCY_S
    backend: Backend = "nccl"

    def seconds(self, sent: Iterable[Transfer], ranks: int) -> float:
        """Time of sequential transfers: `messages * alpha + bytes on the wire / beta`."""
        if ranks == 1:
            return 0.0
        return sum(
            part.messages(ranks) * self.latency_s + part.wire_bytes(ranks, self.backend) / self.bytes_per_s
            for part in sent
        )
