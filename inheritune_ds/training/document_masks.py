"""Attention masks for windows of several documents, built without waiting for the device.

transformers detects documents by restarting position ids, for every mask of a model, sliding windows and chunks
included (`masking_utils.find_packed_sequence_indices`), and waits for the device in every forward pass. Here the caller
decides.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from inheritune_ds.training.padded_attention import pad_heads

_APART = ContextVar("documents are kept apart", default=False)


@contextmanager
def documents_apart() -> Iterator[None]:
    """Inside, a document begins wherever a model's position ids restart.

    Masks are additive, in the model's type: SDPA would convert a boolean mask again in every block.
    """
    skip_packing_check()
    pad_heads()
    before = _APART.set(True)
    try:
        yield
    finally:
        _APART.reset(before)


def skip_packing_check() -> None:
    """Stop transformers from looking for packed sequences in the position ids, where the host waits for the device.

    Outside `documents_apart` a window is one sequence.
    """
    from transformers import masking_utils, modeling_flash_attention_utils

    masking_utils.find_packed_sequence_indices = _documents
    masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa", _sdpa_mask)
    modeling_flash_attention_utils._is_packed_sequence = lambda position_ids, batch_size: False  # noqa: ARG005, SLF001


def _documents(position_ids: torch.Tensor) -> torch.Tensor | None:
    """Index of each token's document in its row, for position ids (B, T); None for one document a row."""
    if not _APART.get():
        return None
    steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    return (steps != 1).cumsum(-1)


def _sdpa_mask(**given: Any) -> torch.Tensor | None:
    from transformers.masking_utils import eager_mask, sdpa_mask

    mask: torch.Tensor | None = (eager_mask if _APART.get() else sdpa_mask)(**given)
    return mask
