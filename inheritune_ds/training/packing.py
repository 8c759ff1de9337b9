"""What a model is given of a window, and what a document is inside one.

Windows are cut out of a row of documents. Under `training.packing: documents` a document begins at the start of a
window and after every end-of-document token; attention does not cross, positions begin anew, and no loss is counted for
the first token of a document, which nothing before it tells of.

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
"""Room for boundaries is made as if no document of a micro-batch were shorter on average; it grows where one is."""
_TOLERANCE = {torch.float32: 1e-3}
_TOLERANCE_HALF = 0.05
"""Relative error of logits that are right by far in such a type, and wrong by any mistake in mask or positions."""
_PROBE = ((5, 7), (8, 4))
"""Tokens of two documents in each window of the probe."""


@dataclass(frozen=True)
class DocumentPacking:
    """How documents are told in a row of tokens.

    Attributes:
        eos_id: The token that ends every document, and stands nowhere else.
    """

    eos_id: int


def counted_targets(tokens_BT1: torch.Tensor, packing: DocumentPacking | None) -> torch.Tensor:  # noqa: N803
    """Which targets (B, T) of windows (B, T + 1) a loss is counted for: padding has negative ids."""
    counted = tokens_BT1[:, 1:] >= 0
    return counted if packing is None else counted & (tokens_BT1[:, :-1] != packing.eos_id)


def mean_losses(
    losses: torch.Tensor,
    tokens_BT1: torch.Tensor,  # noqa: N803 - shape suffix
    packing: DocumentPacking | None,
) -> npt.NDArray[np.float64]:
    """Mean loss (B,) of every window over its counted targets; 0 for one that has none.

    Args:
        losses: Of each target, (B, T) or (1, N), 0 where none is counted.
        tokens_BT1: The windows, on the host.
        packing: How documents are kept apart.
    """
    losses_BT = losses.double().view(len(tokens_BT1), -1)  # noqa: N806 - shape suffix
    if packing is None:
        return losses_BT.mean(dim=1).cpu().numpy()
    counts = counted_targets(tokens_BT1, packing).sum(dim=1).clamp(min=1)
    return (losses_BT.sum(dim=1).cpu() / counts).numpy()


def document_starts(inputs_BT: torch.Tensor, eos_id: int) -> torch.Tensor:  # noqa: N803 - shape suffix
    """Where a document begins (B, T): at the start of a window, and after every end of a document."""
    starts = torch.ones_like(inputs_BT, dtype=torch.bool)
    starts[:, 1:] = inputs_BT[:, :-1] == eos_id
    return starts


def positions(inputs_BT: torch.Tensor, eos_id: int) -> torch.Tensor:  # noqa: N803 - shape suffix
    """Position of every token in its document (B, T)."""
    index = torch.arange(inputs_BT.shape[1], device=inputs_BT.device)
    begun = torch.where(document_starts(inputs_BT, eos_id), index, 0).cummax(dim=1).values
    return index - begun


class WindowInputs:
    """Turns windows into what a model is called with.

    Args:
        packing: How documents are kept apart; None if a window is one text.
        attention: transformers' `attn_implementation`. Flash attention takes the boundaries of documents in a row of
            all windows, the others a mask.
    """

    def __init__(self, packing: DocumentPacking | None, attention: str) -> None:
        self.packing, self.attention = packing, attention
        self._varlen = packing is not None and attention.startswith("flash_attention")
        self._room: dict[int, int] = {}

    def apart(self) -> AbstractContextManager[None]:
        """What a forward pass has to run in."""
        return nullcontext() if self.packing is None or self._varlen else documents_apart()

    def inputs(self, tokens_BT: torch.Tensor, device: torch.device) -> dict[str, Any]:  # noqa: N803 - shape suffix
        """What a model takes of tokens.

        Args:
            tokens_BT: Host tensor of token ids; negative ones are padding.
            device: Where the model computes.
        """
        return self._of(tokens_BT, tokens_BT.to(device, non_blocking=True))

    def with_targets(self, tokens_BT1: torch.Tensor, device: torch.device) -> dict[str, Any]:  # noqa: N803
        """What `HeadLoss` takes of windows: `inputs`, and the ids that follow.

        Args:
            tokens_BT1: Host tensor (B, T + 1) of token ids; negative ones are padding.
            device: Where the model computes.
        """
        moved_BT1 = tokens_BT1.to(device, non_blocking=True)  # noqa: N806 - shape suffix
        targets = moved_BT1[:, 1:].masked_fill(~counted_targets(moved_BT1, self.packing), IGNORED)
        inputs = self._of(tokens_BT1[:, :-1], moved_BT1[:, :-1])
        return {**inputs, "targets": targets.reshape(inputs["input_ids"].shape)}

    def _of(self, host_BT: torch.Tensor, moved_BT: torch.Tensor) -> dict[str, Any]:  # noqa: N803 - shape suffix
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
        # The longest document could be known, but a number that changes would have blocks compiled again.
        longest = moved_BT.shape[1]
        lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
        return {**inputs, **row, **lengths}

    def boundaries(self, host_BT: torch.Tensor) -> torch.Tensor:  # noqa: N803 - shape suffix
        """Where documents begin in the row of all windows, and its end, as flash attention takes them (int32).

        The count of documents changes, the length of the result should not: compiled blocks would be compiled again.
        So it ends with empty documents; where there are too many for that it doubles, and stays so.
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
    """Prove on a few tokens that a model keeps documents apart: its masks and positions may be its family's own.

    Other tokens in the first document of a window must not change one bit of the second's logits, and these must be
    those of the second document alone.

    Args:
        windows: How the model is given documents.
        forward: Logits (B, T, V), or (1, N, V), of what a model takes; in evaluation mode.
        config: The model's.
        device: Where it computes.
        dtype: What it computes in.

    Raises:
        RecipeError: If they are not kept apart.
    """
    assert windows.packing is not None
    plain = WindowInputs(None, windows.attention)
    eos_id, refuse = windows.packing.eos_id, partial(_mixes, config.model_type, windows.attention)
    tokens, others = (_probe_tokens(eos_id, config.vocab_size, shift) for shift in (0, 1))
    with windows.apart():
        try:
            found, changed = (
                forward(windows.inputs(given, device)).view(*given.shape, -1) for given in (tokens, others)
            )
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
    """Windows of two documents; `shift` changes every token of the first but its end."""
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
        allowed="a family that tells documents by position ids which begin anew, such as llama or gpt2",
        action="write training.packing: windows, or name another kernels.attention in the DeepSpeed config",
    )
