"""Where a run stands, what a saved state depends on, and what ranks agree on after a step.

Torch is not imported here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

BatchRange = tuple[int, int]
"""Batch numbers from the first up to, and without, the second."""


@dataclass(frozen=True)
class FaultState:
    """What is remembered of faults from step to step.

    Attributes:
        in_a_row: Updates left out, one after the other, up to now.
        rollbacks: How often the run has gone back to a checkpoint.
        losses: Losses of the last accepted steps, which a spike is told from.
        grad_norms: Gradient norms of the same steps.
    """

    in_a_row: int = 0
    rollbacks: int = 0
    losses: tuple[float, ...] = ()
    grad_norms: tuple[float, ...] = ()


@dataclass(frozen=True)
class TrainState:
    """Where a run stands; everything else (order of data, learning rate, randomness) follows from it.

    Attributes:
        step: Optimizer updates done, those left out among them.
        tokens: Tokens seen.
        skipped_steps: Updates that were left out.
        train_seconds: Time spent in optimizer steps, over all launches that count.
        faults: What is remembered of faults.
        left_out: Batches that a rollback has skipped, ascending and apart.
        validation_due: Whether the validation of this step is still to be done.
    """

    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    train_seconds: float = 0.0
    faults: FaultState = FaultState()
    left_out: tuple[BatchRange, ...] = ()
    validation_due: bool = False

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "TrainState":
        """Read what `as_dict` has written."""
        faults = document["faults"]
        windows = {name: tuple(faults[name]) for name in ("losses", "grad_norms")}
        left_out = tuple((first, end) for first, end in document["left_out"])
        return cls(**{**document, "faults": FaultState(**{**faults, **windows}), "left_out": left_out})

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it; floats come back to the last bit."""
        return asdict(self)

    @property
    def batch_number(self) -> int:
        """Number of the next batch in the order of the data."""
        return batch_of(self.step, self.left_out)


@dataclass(frozen=True)
class SavedLayout:
    """What a DeepSpeed state depends on.

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


def batch_of(step: int, left_out: Sequence[BatchRange]) -> int:
    """The batch that a step reads.

    Args:
        step: From 0.
        left_out: Batches that no step reads, ascending and apart.
    """
    number = step
    for first, end in left_out:
        if number >= first:
            number += end - first
    return number


def with_range(left_out: Sequence[BatchRange], more: BatchRange) -> tuple[BatchRange, ...]:
    """Leave out another range, too; ranges that touch become one."""
    joined: list[BatchRange] = []
    for first, end in sorted([*left_out, more]):
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((first, end))
    return tuple(joined)
