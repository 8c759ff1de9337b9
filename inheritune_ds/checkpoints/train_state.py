"""The progress of a run, the layout of a saved state, and the requests to a run; imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

BatchRange = tuple[int, int]
"""First batch number, and the number after the last."""


@dataclass(frozen=True)
class FaultState:
    """The record of recent faults."""

    in_a_row: int = 0
    """Updates skipped in a row up to now."""
    rollbacks: int = 0
    losses: tuple[float, ...] = ()
    """Of the last accepted steps, to detect spikes."""
    grad_norms: tuple[float, ...] = ()
    """Of the same steps."""


@dataclass(frozen=True)
class TrainState:
    """The progress of a run; order of data, learning rate and random numbers follow from it."""

    step: int = 0
    """Optimizer updates, including skipped ones."""
    tokens: int = 0
    skipped_steps: int = 0
    train_seconds: float = 0.0
    """Time in optimizer steps of all launches, without steps that were repeated."""
    faults: FaultState = FaultState()
    skipped_batches: tuple[BatchRange, ...] = ()
    """By rollbacks; ascending and disjoint."""
    validation_due: bool = False
    """Whether the validation of this step is still to be done."""

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "TrainState":
        """Restore the state from `as_dict`."""
        faults = document["faults"]
        windows = {name: tuple(faults[name]) for name in ("losses", "grad_norms")}
        skipped_batches = tuple((first, end) for first, end in document["skipped_batches"])
        return cls(**{**document, "faults": FaultState(**{**faults, **windows}), "skipped_batches": skipped_batches})

    def as_dict(self) -> dict[str, Any]:
        """Values for JSON, which restores floats to the last bit."""
        return asdict(self)

    @property
    def batch_number(self) -> int:
        """Number of the next batch in the order of the data."""
        return batch_of(self.step, self.skipped_batches)


@dataclass(frozen=True)
class SavedLayout:
    """The layout of a saved state."""

    world_size: int
    zero_stage: int
    precision: str
    """fp32, bf16 or fp16."""


@dataclass(frozen=True)
class Requests:
    """Requests to a rank; at the end of a step, a request to any rank becomes one to all."""

    stop: bool = False
    """Save and exit."""
    save: bool = False
    """Save and continue."""
    evaluate: bool = False
    """Validate now."""


def batch_of(step: int, skipped_batches: Sequence[BatchRange]) -> int:
    """The batch of a step, both from 0; `skipped_batches` are ascending and disjoint."""
    number = step
    for first, end in skipped_batches:
        if number >= first:
            number += end - first
    return number


def with_range(skipped_batches: Sequence[BatchRange], more: BatchRange) -> tuple[BatchRange, ...]:
    """Add a range; adjacent ranges are joined."""
    joined: list[BatchRange] = []
    for first, end in sorted([*skipped_batches, more]):
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((first, end))
    return tuple(joined)
