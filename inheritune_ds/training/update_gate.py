"""Inside one optimizer update: the agreement of the ranks, and whether it is applied."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from inheritune_ds.checkpoints.train_state import Requests
from inheritune_ds.errors import CorpusError
from inheritune_ds.training.faults import not_finite
from inheritune_ds.training.packing import DocumentPacking, counted_targets

Judge = Callable[[float, float], str | None]
"""Loss and gradient norm of the global batch -> why to skip the update, or None; must decide alike on all ranks."""


class UpdateGate:
    """Lets a judge decide whether DeepSpeed's optimizer applies an update, at the point where DeepSpeed decides it.

    DeepSpeed skips an update when the norm of the whole gradient is not finite: it clears gradients and accumulation
    buffers, and changes neither weights nor moments. The judge is called there, once a step, with that norm. Loss and
    norm come out of all-reduces, equal on all ranks to the last bit, so all ranks decide alike.

    A dynamic loss scale (fp16) that was too large is no fault, unless the loss itself is not finite or the scale is at
    its minimum.

    Args:
        optimizer: DeepSpeed's; methods of this object are replaced.
        ranks: Size of the process group.
    """

    def __init__(self, optimizer: Any, ranks: int) -> None:
        self._optimizer, self._ranks = optimizer, ranks
        self._loss = math.nan
        self._judge: Judge = not_finite
        self.fault: str | None = None
        self.grad_norm = math.nan
        if hasattr(optimizer, "get_grads_for_norm"):
            self._enter_bf16_optimizer()
        else:
            self._enter_zero_optimizer()

    def expect(self, loss: float, judge: Judge) -> None:
        """Set the loss and the judge of the next update."""
        self._loss, self._judge = loss, judge

    def _enter_zero_optimizer(self) -> None:
        """Stages 1 to 3 (runtime/zero/stage_1_and_2.py and stage3.py, `step`, DeepSpeed 0.19).

        They compute the norm, pass an overflow to `_update_scale`, and only then read `overflow`.
        """
        optimizer = self._optimizer
        self._scaled_norm: torch.Tensor | None = None
        self._update_scale: Callable[[bool], None] = optimizer._update_scale  # noqa: SLF001 - no public way
        optimizer._update_scale = self._decide  # noqa: SLF001
        name = "scaled_global_norm" if hasattr(optimizer, "scaled_global_norm") else "_get_norm_groups"  # stage 3
        computed: Callable[[], torch.Tensor | list[torch.Tensor]] = getattr(optimizer, name)
        setattr(optimizer, name, lambda: self._keep(computed()))

    def _keep(self, norms: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(norms, list):
            # Like DeepSpeed's combine_grad_norm_groups: -1 means a norm that is not finite.
            stacked = torch.stack(norms)
            self._scaled_norm = torch.where((stacked < 0).any(), math.inf, torch.linalg.vector_norm(stacked))
        else:
            self._scaled_norm = norms
        return norms

    def _decide(self, overflow: bool) -> None:  # noqa: FBT001 - DeepSpeed's signature
        optimizer, norm, self._scaled_norm = self._optimizer, self._scaled_norm, None
        # DeepSpeed computes no norm after an element that is not finite.
        self.grad_norm = math.inf if overflow or norm is None else float(norm) / float(optimizer.loss_scale)
        scaler = optimizer.loss_scaler
        lowers = overflow and math.isfinite(self._loss) and scaler.dynamic and scaler.cur_scale > scaler.min_scale
        self.fault = None if lowers else self._judge(self._loss, self.grad_norm)
        optimizer.overflow = overflow or self.fault is not None
        if self.fault is None:  # a skipped step keeps the scale
            self._update_scale(overflow)
        if optimizer.overflow and getattr(optimizer, "cpu_offload", False):
            # DeepSpeed 0.19.8 does not clear the sums of half-precision gradients here: the next step's would be added
            # to them, and a value that is not finite would stay.
            optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)

    def _enter_bf16_optimizer(self) -> None:
        """The optimizer that DeepSpeed takes for ZeRO-1 in bf16 with fp32 sums (runtime/bf16_optimizer.py, `step`).

        It calls `get_grads_for_norm` and skips the update if the norm of these gradients is not finite. Of a single
        number the norm is that number.
        """
        inner = self._optimizer.get_grads_for_norm

        def grads_for_norm(for_clipping: bool = False) -> Any:  # noqa: FBT001, FBT002 - DeepSpeed's signature
            if for_clipping:
                return inner(for_clipping=True)
            gradients, of_experts = inner()
            norm = self._whole_norm(gradients)
            self.grad_norm = float(norm)
            self.fault = self._judge(self._loss, self.grad_norm)
            return [norm if self.fault is None else torch.full_like(norm, math.inf)], of_experts

        self._optimizer.get_grads_for_norm = grads_for_norm

    def _whole_norm(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """As DeepSpeed's get_global_norm_of_tensors computes it, to the last bit."""
        norm = torch.stack([gradient.detach().float().norm(2.0) for gradient in gradients]).pow(2.0).sum().pow(0.5)
        norm = norm.nan_to_num(nan=math.inf, posinf=math.inf)
        if self._ranks > 1:
            # Every rank takes the norm of its own copy of the whole gradient. With one damaged copy, one rank would
            # skip the update, and the others would wait for it.
            dist.all_reduce(norm, op=dist.ReduceOp.MAX)
        return norm


def count_targets(  # noqa: PLR0913 - a batch and its context
    micro_batches: Sequence[torch.Tensor],
    packing: DocumentPacking | None,
    *,
    vocabulary: int,
    step: int,
    ranks: int,
    device: torch.device,
) -> int:
    """Count the targets with a loss in the global batch of micro-batches (B, T + 1), at least 1; on all ranks together.

    Raises:
        CorpusError: On all ranks together, if a token id of any rank is not in the vocabulary. On a GPU such an id
            would end the process inside a kernel, on a CPU one rank alone.
    """
    own = sum(int(counted_targets(batch, packing).sum()) for batch in micro_batches)
    highest = max(int(batch.max()) for batch in micro_batches)
    found = torch.tensor([own, highest >= vocabulary], device=device)
    if ranks > 1:
        dist.all_reduce(found)
    count, strange = found.tolist()
    if strange:
        worst = torch.tensor(highest, device=device)
        if ranks > 1:
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        raise CorpusError(
            f"step {step}: the batch has token id {int(worst)}, but the model has {vocabulary} tokens",
            allowed=f"0 to {vocabulary - 1}",
            action="a token file is damaged, or was made with another tokenizer: remove its folder below the cache, "
            "then rerun the same command",
        )
    return max(int(count), 1)


def totals(requests: Requests, device: torch.device) -> torch.Tensor:
    """The tensor (4,) to sum over the ranks: token losses (0 at first), stop, save, evaluate; fp64 for exact sums."""
    return torch.tensor([0.0, requests.stop, requests.save, requests.evaluate], dtype=torch.float64, device=device)


def agreed(totals_: torch.Tensor) -> tuple[float, Requests]:
    """Sum `totals` over the ranks into the token losses and the requests to any rank; waits for the device."""
    dist.all_reduce(totals_)
    loss_sum, *asked = totals_.tolist()
    return loss_sum, Requests(*(count > 0 for count in asked))
