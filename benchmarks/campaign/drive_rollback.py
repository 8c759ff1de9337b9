"""Started by the part `faults` in place of train.py: a run in which some batches spoil the loss of one rank.

`drive_rollback.py BAD REMOVED ARGUMENTS...`: BAD names batches (`5,6,7`, or `5+` for all from the fifth on); REMOVED is
`first:end` of batches that the order of the data does not have, or `none`. The last token of the vocabulary represents
a damaged one: its embedding is NaN, and only the bad batches of the last rank have it.
"""

import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from inheritune_ds.cli import main
from inheritune_ds.data.stream.batches import BatchStream

MARKED = 299
Batches = Iterator[NDArray[np.int64]]


def is_bad(number: int, bad: str) -> bool:
    """Whether a batch is among those named."""
    if bad.endswith("+"):
        return number >= int(bad[:-1])
    return str(number) in bad.split(",")


def spoil(bad: str, removed: str) -> Any:
    """In place of `BatchStream.micro_batches`."""
    inner = BatchStream.micro_batches
    first, end = (0, 0) if removed == "none" else map(int, removed.split(":"))

    def micro_batches(
        stream: BatchStream, number: int, *, rank: int, world_size: int, micro_batch_size: int
    ) -> Batches:
        if number >= first:
            number += end - first
        given = inner(stream, number, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size)
        for place, batch in enumerate(given):
            own = np.where(batch == MARKED, MARKED - 1, batch)
            if place == 0 and rank == world_size - 1 and is_bad(number, bad):
                own[0, 3] = MARKED
            yield own

    return micro_batches


def watched_embedding() -> Any:
    """In place of `Engine.__init__`: the embedding of MARKED is NaN in training."""
    import torch

    from inheritune_ds.training.engine import Engine

    inner = Engine.__init__

    def build(engine: Engine, *given: Any, **named: Any) -> None:
        inner(engine, *given, **named)
        embedding: Any = engine.module.get_input_embeddings()  # type: ignore[operator]
        embedding.register_forward_hook(
            lambda _module, ids, output: (
                torch.where((ids[0] == MARKED).unsqueeze(-1), torch.nan, output) if engine.module.training else None
            )
        )

    return patch.object(Engine, "__init__", build)


if __name__ == "__main__":
    bad_batches, removed_batches, *arguments = sys.argv[1:]
    with patch.object(BatchStream, "micro_batches", spoil(bad_batches, removed_batches)), watched_embedding():
        code = main(["train", *arguments])
    sys.exit(code)
