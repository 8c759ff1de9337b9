"""Attention masks for windows of several documents, built without waiting for the device.

transformers tells documents apart by position ids that begin anew, in every mask of a model, sliding windows and
chunks among them (`masking_utils.find_packed_sequence_indices`). Whether there are several it asks the device, in every
forward pass. Here the caller knows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

_APART = ContextVar("documents are kept apart", default=False)


@contextmanager
def documents_apart() -> Iterator[None]:
    """Inside, a document begins wherever the position ids that a model is given begin anew.

    Masks are numbers to be added, in the model's type: SDPA makes them of a boolean mask, too, but anew in every block.
    """
    skip_packing_check()
    before = _APART.set(True)
    try:
        yield
    finally:
        _APART.reset(before)


def skip_packing_check() -> None:
    """Do not let transformers look, in every forward pass, whether position ids tell of several sequences in a row.

    It asks the device for the answer, so the host waits once a micro-step. A window is one sequence, with the positions
    0 to T - 1, but inside `documents_apart`.
    """
    from transformers import masking_utils, modeling_flash_attention_utils

    masking_utils.find_packed_sequence_indices = _documents
    masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa", _sdpa_mask)
    modeling_flash_attention_utils._is_packed_sequence = lambda position_ids, batch_size: False  # noqa: ARG005, SLF001


def _documents(position_ids: torch.Tensor) -> torch.Tensor | None:
    """Number of each token's document in its row, for position ids (B, T); None for one document a row."""
    if not _APART.get():
        return None
    steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    return (steps != 1).cumsum(-1)


def _sdpa_mask(**given: Any) -> torch.Tensor | None:
    from transformers.masking_utils import eager_mask, sdpa_mask

    if _APART.get():
        return eager_mask(**given)
    mask: torch.Tensor | None = sdpa_mask(**given)
    return mask
