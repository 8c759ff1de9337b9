"""Turn windows into the inputs of a model, with documents kept apart or not.

Under `training.packing: documents` a document begins at the start of a window and after every end-of-document token.
Attention does not cross into another document, positions restart, and the first token of a document has no loss.

Shapes: B sequences, T tokens a window, N = B * T tokens, V vocabulary.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from inheritune_ds.errors import RecipeError
from inheritune_ds.training.document_masks import documents_apart
from inheritune_ds.training.loss import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TOKENS_A_DOCUMENT = 64
"""Least mean document length that the first buffer of boundaries is made for; it grows when documents are shorter."""
_TOLERANCE = {torch.float32: 1e-3}
_TOLERANCE_HALF = 0.05
"""Relative error in half precision: far above rounding, and below any mistake in mask or positions."""
_PROBE = ((5, 7), (8, 4))
"""Tokens of two documents in each window of the probe."""


@dataclass(frozen=True)
class DocumentPacking:
    """How documents are recognized in a sequence of tokens."""

    eos_id: int
    """Ends every document, and appears nowhere else."""


def counted_targets(tokens_BT1: torch.Tensor, packing: DocumentPacking | None) -> torch.Tensor:
    """Mask (B, T) of the targets of windows (B, T + 1) that have a loss: padding has negative ids."""
    counted = tokens_BT1[:, 1:] >= 0
    return counted if packing is None else counted & (tokens_BT1[:, :-1] != packing.eos_id)


def losses_by_window(losses: torch.Tensor, tokens_BT1: torch.Tensor) -> npt.NDArray[np.float32]:
    """Losses (B, T) of windows on the host, of losses (B, T) or (1, N)."""
    return losses.float().view(len(tokens_BT1), -1).cpu().numpy()


def document_starts(inputs_BT: torch.Tensor, eos_id: int) -> torch.Tensor:
    """Mask (B, T) of the first tokens of documents: at the start of a window, and after every `eos_id`."""
    starts = torch.ones_like(inputs_BT, dtype=torch.bool)
    starts[:, 1:] = inputs_BT[:, :-1] == eos_id
    return starts


def positions(inputs_BT: torch.Tensor, eos_id: int) -> torch.Tensor:
    """Position of every token in its document (B, T)."""
    index = torch.arange(inputs_BT.shape[1], device=inputs_BT.device)
    begun = torch.where(document_starts(inputs_BT, eos_id), index, 0).cummax(dim=1).values
    return index - begun


class WindowInputs:
    """Turns windows into a model's keyword arguments.

    Args:
        packing: How documents are kept apart; None if a window is one text.
        attention: transformers' `attn_implementation`. Flash attention takes all windows as one row with the
            boundaries of its documents, the others take a mask.
    """

    def __init__(self, packing: DocumentPacking | None, attention: str) -> None:
        self.packing, self.attention = packing, attention
        self._varlen = packing is not None and attention.startswith("flash_attention")
        self._room: dict[int, int] = {}

    def apart(self) -> AbstractContextManager[None]:
        """The context of a forward pass."""
        return nullcontext() if self.packing is None or self._varlen else documents_apart()

    def inputs(self, tokens_BT: torch.Tensor, device: torch.device) -> dict[str, Any]:
        """Inputs without targets of token ids on the host; negative ids are padding."""
        return self._of(tokens_BT, tokens_BT.to(device, non_blocking=True))

    def with_targets(self, tokens_BT1: torch.Tensor, device: torch.device) -> dict[str, Any]:
        """Inputs and targets for `HeadLoss` of token ids on the host; negative ids are padding."""
        moved_BT1 = tokens_BT1.to(device, non_blocking=True)
        targets = moved_BT1[:, 1:].masked_fill(~counted_targets(moved_BT1, self.packing), IGNORED)
        inputs = self._of(tokens_BT1[:, :-1], moved_BT1[:, :-1])
        return {**inputs, "targets": targets.reshape(inputs["input_ids"].shape)}

    def _of(self, host_BT: torch.Tensor, moved_BT: torch.Tensor) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": moved_BT.clamp(min=0), "use_cache": False}
        if self.packing is None:
            return inputs
        inputs["position_ids"] = positions(moved_BT, self.packing.eos_id)
        if not self._varlen:
            return inputs
        boundaries = self.boundaries(host_BT)
        if moved_BT.device.type == "cuda":
            boundaries = boundaries.pin_memory()
        bounds = boundaries.to(moved_BT.device, non_blocking=True)
        row = {key: inputs[key].reshape(1, -1) for key in ("input_ids", "position_ids")}
        # The longest document is known, but a number that changes would recompile the blocks.
        longest = moved_BT.shape[1]
        lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
        return {**inputs, **row, **lengths}

    def boundaries(self, host_BT: torch.Tensor) -> torch.Tensor:
        """Starts of documents in the row of all windows, and its end, as flash attention takes them (int32).

        Padded with empty documents to a constant length, so that compiled blocks are not recompiled; the length doubles
        when there are too many documents.
        """
        assert self.packing is not None
        total = host_BT.numel()
        starts = document_starts(host_BT, self.packing.eos_id).flatten().nonzero().flatten()
        room = self._room.get(total, len(host_BT) + total // TOKENS_A_DOCUMENT)
        while room < len(starts):
            room *= 2
        self._room[total] = room
        bounds = torch.full((room + 1,), total, dtype=torch.int32)
        bounds[: len(starts)] = starts
        return bounds


@torch.no_grad()
def prove_apart(
    windows: WindowInputs,
    forward: Callable[[dict[str, Any]], torch.Tensor],
    config: "PreTrainedConfig",
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Prove on a few tokens that a model keeps documents apart, whatever masks and positions its family computes.

    Other tokens in the first document of a window must not change a bit of the second document's logits, and these must
    equal the logits of the second document alone. `forward` turns inputs into logits (B, T, V) or (1, N, V).

    Raises:
        RecipeError: If documents are not kept apart.
    """
    assert windows.packing is not None
    plain = WindowInputs(None, windows.attention)
    eos_id, refuse = windows.packing.eos_id, partial(_mixes, config.model_type, windows.attention)
    tokens, others = (_probe_tokens(eos_id, config.vocab_size, shift) for shift in (0, 1))
    with windows.apart():
        try:
            found, changed = (forward(windows.inputs(ids, device)).view(*ids.shape, -1) for ids in (tokens, others))
        except TypeError as unknown:
            raise refuse(f"it does not take them ({unknown})") from None
    for row, (first, second) in enumerate(_PROBE):
        logits = found[row, first:]
        if not torch.equal(logits, changed[row, first:]):
            raise refuse("a token changes the logits of the document behind its own")
        wanted = forward(plain.inputs(tokens[row : row + 1, first:], device))[0]
        error = float((logits - wanted).norm() / wanted.norm())
        if not error <= _TOLERANCE.get(dtype, _TOLERANCE_HALF):
            raise refuse(f"one of {second} tokens has other logits than alone (relative error {error:.2g})")


def _probe_tokens(eos_id: int, vocab_size: int, shift: int) -> torch.Tensor:
    """Windows of two documents; `shift` changes every token of the first except its end."""
    usable = [token for token in range(min(vocab_size, 64)) if token != eos_id]
    rows = []
    for number, (first, second) in enumerate(_PROBE):
        opening = [usable[(7 * place + 3 * number + shift) % len(usable)] for place in range(first - 1)]
        rows.append([*opening, eos_id, *(usable[(5 * place + number) % len(usable)] for place in range(second))])
    return torch.tensor(rows)


def _mixes(model_type: str, attention: str, found: str) -> RecipeError:
    return RecipeError(
        f"training.packing is documents, but a {model_type} model with {attention} attention does not keep them "
        f"apart: {found}",
        allowed="a family that recognizes documents by restarting position ids, such as llama or gpt2",
        action="write training.packing: windows, or name another kernels.attention in the DeepSpeed config",
    )
