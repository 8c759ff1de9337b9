"""The progress of a run, the layout it was saved under, and what ranks agree on after a step.

Torch is not imported here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

BatchRange = tuple[int, int]
"""Batch numbers from the first up to, and without, the second."""


@dataclass(frozen=True)
class FaultState:
    """The record of faults that is kept from step to step.

    Attributes:
        in_a_row: Updates skipped one after the other up to now.
        rollbacks: Number of rollbacks to a checkpoint.
        losses: Losses of the last accepted steps, against which spikes are detected.
        grad_norms: Gradient norms of the same steps.
    """

    in_a_row: int = 0
    rollbacks: int = 0
    losses: tuple[float, ...] = ()
    grad_norms: tuple[float, ...] = ()


@dataclass(frozen=True)
class TrainState:
    """The progress of a run; order of data, learning rate and random numbers follow from it.

    Attributes:
        step: Optimizer updates done, skipped ones among them.
        tokens: Tokens seen.
        skipped_steps: Updates that were skipped.
        train_seconds: Seconds spent in optimizer steps, over all launches that count.
        faults: Record of recent faults.
        skipped_batches: Batches that rollbacks have skipped, ascending and disjoint.
        validation_due: Whether the validation of this step is still to be done.
    """

    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    train_seconds: float = 0.0
    faults: FaultState = FaultState()
    skipped_batches: tuple[BatchRange, ...] = ()
    validation_due: bool = False

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "TrainState":
        """Read what `as_dict` has written."""
        faults = document["faults"]
        windows = {name: tuple(faults[name]) for name in ("losses", "grad_norms")}
        skipped_batches = tuple((first, end) for first, end in document["skipped_batches"])
        return cls(**{**document, "faults": FaultState(**{**faults, **windows}), "skipped_batches": skipped_batches})

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it; floats come back to the last bit."""
        return asdict(self)

    @property
    def batch_number(self) -> int:
        """Number of the next batch in the order of the data."""
        return batch_of(self.step, self.skipped_batches)


@dataclass(frozen=True)
class SavedLayout:
    """The layout that a state was saved under.

    Attributes:
        world_size: Number of ranks.
        zero_stage: ZeRO stage.
        precision: fp32, bf16 or fp16.
    """

    world_size: int
    zero_stage: int
    precision: str


@dataclass(frozen=True)
class Requests:
    """What a rank was asked for; agreed on at the end of a step, any rank's wish is everybody's.

    Attributes:
        stop: Save and leave.
        save: Save and go on.
        evaluate: Validate now.
    """

    stop: bool = False
    save: bool = False
    evaluate: bool = False


def batch_of(step: int, skipped_batches: Sequence[BatchRange]) -> int:
    """The batch that a step reads.

    Args:
        step: From 0.
        skipped_batches: Batches that no step reads, ascending and disjoint.
    """
    number = step
    for first, end in skipped_batches:
        if number >= first:
            number += end - first
    return number


def with_range(skipped_batches: Sequence[BatchRange], more: BatchRange) -> tuple[BatchRange, ...]:
    """Skip another range, too; ranges that touch are joined."""
    joined: list[BatchRange] = []
    for first, end in sorted([*skipped_batches, more]):
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((first, end))
    return tuple(joined)
