"""Cross-entropy of a causal LM: chunked, so that the fp32 logits of a whole micro-batch never exist.

Shapes: B sequences, T tokens a window, N = B * T tokens, D hidden size, V vocabulary.

The chunked loss computes the gradients of hidden states and head in the forward pass, chunk by chunk: nothing is
computed twice, and nothing of size (N, V) is kept. Its arithmetic is that of the plain loss: logits in the model's
type, log-softmax in fp32, their gradient rounded to the model's type; the head's gradient is accumulated in fp32.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn import functional

from inheritune_ds.plan.memory import LOSS_CHUNK_TOKENS
from inheritune_ds.surgery.config_cut import cut_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LossKind = Literal["liger", "chunked", "plain"]
IGNORED = -100
"""Target without a loss (PyTorch's own default)."""
_PROBE_TOKENS = 4


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the token losses times a factor, and the sum itself; gradients are computed in the forward pass."""

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - one argument a tensor
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        factor: float,
        gradients: Callable[..., Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The factor's binary mantissa is applied before the gradient is rounded, its exponent (exact in every type,
        # and too small for fp16 before the loss scale) in the backward pass.
        number, exponent = math.frexp(factor)
        ctx.scale = math.ldexp(1.0, exponent)
        # As a number it would be a constant of the compiled code, which would be made again for every other count.
        mantissa = torch.full((), number, dtype=torch.float32, device=hidden_ND.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        grad_hidden_ND = torch.empty_like(hidden_ND)
        for start in range(0, len(hidden_ND), LOSS_CHUNK_TOKENS):
            rows = slice(start, start + LOSS_CHUNK_TOKENS)
            losses, grad_logits = gradients(hidden_ND[rows], weight_VD, bias_V, targets_N[rows], mantissa)
            total += losses.sum()
            torch.mm(grad_logits, weight_VD, out=grad_hidden_ND[rows])
            grad_weight_VD.add_(grad_logits.T @ hidden_ND[rows])
            if grad_bias_V is not None:
                grad_bias_V.add_(grad_logits.sum(dim=0, dtype=torch.float32))
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD, grad_bias_V)
        ctx.mark_non_differentiable(total)
        ctx.types = weight_VD.dtype, bias_V.dtype if bias_V is not None else None
        return total * factor, total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD, grad_bias_V = ctx.saved_tensors
        scale = grads[0] * ctx.scale
        weight_type, bias_type = ctx.types
        hidden, weight = grad_hidden_ND * scale.to(grad_hidden_ND.dtype), (grad_weight_VD * scale).to(weight_type)
        bias = None if grad_bias_V is None else (grad_bias_V * scale).to(bias_type)
        return hidden, weight, bias, None, None, None


def _chunk_gradients(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    factor: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token losses (N,) in fp32 and `factor` () times the gradient of their sum by the logits (N, V), model's type."""
    logits_NV = functional.linear(hidden_ND, weight_VD, bias_V)
    log_probs_NV = functional.log_softmax(logits_NV, dim=-1, dtype=torch.float32)
    counted_N1 = (targets_N != IGNORED).unsqueeze(1)
    index_N1 = targets_N.clamp(min=0).unsqueeze(1)
    losses_N = -(log_probs_NV.gather(1, index_N1) * counted_N1).squeeze(1)
    weights_N1 = counted_N1 * factor
    probs_NV = log_probs_NV.exp_().mul_(weights_N1)
    probs_NV.scatter_add_(1, index_N1, -weights_N1.to(probs_NV.dtype))
    return losses_N, probs_NV.to(logits_NV.dtype)


@torch.no_grad()
def _token_losses(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits_NV.float(), targets_N, ignore_index=IGNORED, reduction="none")


class HeadLoss:
    """Replaces the `forward` of a causal LM by one that returns the loss when targets are given.

    The head is called as a module, with hidden states and targets: hooks around it (ZeRO-3 gathers its weight) run.
    """

    def __init__(self, model: "PreTrainedModel", kind: LossKind, gradients: Callable[..., Any]) -> None:
        self._model, self._kind, self._gradients = model, kind, gradients
        self._own_forward = model.forward
        if kind != "plain":
            self._head: Any = model.get_output_embeddings()
            self._linear = self._head.forward
            self._head.forward = self._head_forward
        model.forward = self.forward

    def forward(
        self, input_ids: torch.Tensor, targets: torch.Tensor | None = None, factor: float = 1.0, **options: Any
    ) -> Any:
        """Run the model.

        Args:
            input_ids: (B, T) token ids.
            targets: (B, T) ids of the next tokens, or IGNORED; None for the model's own output.
            factor: Multiplies the loss to be differentiated.
            **options: Passed to the model.

        Returns:
            With targets and gradients: `factor` times the sum of the token losses, and that sum, detached. With
            targets under `no_grad`: the token losses (B, T) in fp32. Without targets: the model's own output.
        """
        if targets is None:
            return self._own_forward(input_ids=input_ids, **options)
        if self._kind == "plain":
            return _plain(self._own_forward(input_ids=input_ids, **options).logits, targets, factor)
        hidden_BTD = self._model.base_model(input_ids=input_ids, **options)[0]
        return self._head(hidden_BTD, targets, factor)

    def _head_forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None, factor: float = 1.0) -> Any:
        if targets is None:
            return self._linear(hidden)
        hidden_ND, targets_N = hidden.flatten(0, 1), targets.flatten()
        if not torch.is_grad_enabled():
            starts = range(0, len(targets_N), LOSS_CHUNK_TOKENS)
            chunks = [slice(start, start + LOSS_CHUNK_TOKENS) for start in starts]
            losses = [_token_losses(self._linear(hidden_ND[rows]), targets_N[rows]) for rows in chunks]
            return torch.cat(losses).view_as(targets)
        if self._kind == "liger":
            total = liger_sum(hidden_ND, self._head.weight, self._head.bias, targets_N)
            return total * factor, total.detach()
        given = (hidden_ND, self._head.weight, self._head.bias, targets_N, factor, self._gradients)
        return _ChunkedCrossEntropy.apply(*given)  # type: ignore[no-untyped-call]


def _plain(logits_BTV: torch.Tensor, targets: torch.Tensor, factor: float) -> Any:
    logits_NV, targets_N = logits_BTV.flatten(0, 1), targets.flatten()
    if not torch.is_grad_enabled():
        return _token_losses(logits_NV, targets_N).view_as(targets)
    total = functional.cross_entropy(logits_NV.float(), targets_N, ignore_index=IGNORED, reduction="sum")
    return total * factor, total.detach()


def liger_sum(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, targets_N: torch.Tensor
) -> torch.Tensor:
    """Sum of the token losses by Liger's fused head and cross-entropy; the head's gradient is accumulated in fp32."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum", accum_dtype=torch.float32)
    total: torch.Tensor = loss(weight_VD, hidden_ND, targets_N, bias_V)
    return total


def attach_loss(model: "PreTrainedModel", kind: LossKind, *, compiled: bool) -> tuple[LossKind, str]:
    """Put the loss into a model's forward pass, before `deepspeed.initialize`.

    Liger and the chunked loss need logits that are exactly the head's output. Families that scale or cap their logits
    are detected by comparing the two on a few tokens, in a model of the same config with one block and random weights;
    they take the plain loss.

    Returns:
        The kind taken, and the reason if it differs from the requested one.
    """
    reason = "" if kind == "plain" else _not_just_the_head(model)
    taken: LossKind = "plain" if reason else kind
    attach_head_loss(model, taken, compiled=compiled)
    return taken, reason


def attach_head_loss(model: "PreTrainedModel", kind: LossKind, *, compiled: bool) -> None:
    """Put a loss into the forward pass of a model whose logits are its head's output, or a plain one into any model."""
    gradients = torch.compile(_chunk_gradients, dynamic=False) if compiled else _chunk_gradients
    HeadLoss(model, kind, gradients)


@torch.no_grad()
def _not_just_the_head(model: "PreTrainedModel") -> str:
    """Why the logits are not the head applied to the last hidden state; empty if they are."""
    if type(model.get_output_embeddings()) is not nn.Linear:
        return f"the head of a {model.config.model_type} model is not a plain linear layer"
    probe = _one_block(model)
    seen: list[torch.Tensor] = []
    probe.get_output_embeddings().register_forward_hook(lambda _, given, made: seen.extend((given[0], made)))
    tokens = torch.arange(_PROBE_TOKENS).unsqueeze(0)
    logits = probe(input_ids=tokens, use_cache=False).logits
    hidden = probe.base_model(input_ids=tokens, use_cache=False)[0]
    if len(seen) != 2 or not torch.equal(seen[0], hidden) or not torch.equal(seen[1].float(), logits.float()):
        return f"the logits of a {model.config.model_type} model are more than its head's output"
    return ""


def _one_block(model: "PreTrainedModel") -> Any:
    """A model of the same class with one block, a few tokens, and random weights; the model itself may have none."""
    config = cut_config(model.config, [0])
    config.vocab_size, config.pad_token_id = _PROBE_TOKENS, None
    with torch.random.fork_rng(devices=[]):
        return type(model)(config).eval()
