"""Head and cross-entropy alone: time and memory of the chunked, Liger's and the plain loss.

Shapes: B windows, T tokens each, D hidden size, V vocabulary.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks.gpu_parts.part import Part
from benchmarks.gpu_parts.timing import spread, timed_blocks
from inheritune_ds.plan.model_size import GIB
from inheritune_ds.training.kernel_probes import compile_obstacle, liger_loss_obstacle
from inheritune_ds.training.loss import LossKind, attach_head_loss

SIZES = {"V": 50304, "B": 32, "T": 1024, "D": 1024}
TOY = {"V": 512, "B": 2, "T": 32, "D": 16}
KINDS: tuple[tuple[str, LossKind, bool], ...] = (
    ("chunked, compiled", "chunked", True),
    ("chunked", "chunked", False),
    ("liger", "liger", False),
    ("plain", "plain", False),
)


class _HeadOnly(nn.Module):
    """As much of a causal LM as the loss touches: hidden states that are there already, and a head."""

    def __init__(self, hidden_BTD: torch.Tensor, head: nn.Linear) -> None:  # noqa: N803 - shape suffix
        super().__init__()
        self.hidden = nn.Parameter(hidden_BTD)
        self.head = head
        self.device = hidden_BTD.device
        self.base_model = self._base

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def _base(self, input_ids: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        return (self.hidden[: input_ids.shape[0], : input_ids.shape[1]],)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self._base(input_ids)[0]))


def head_loss(part: Part) -> None:
    """Forward and backward pass of each kind, in bf16."""
    sizes, device = part.sized(SIZES, TOY), torch.device(part.device)
    part.report.figure("sizes", sizes)
    found: dict[str, Any] = {}
    part.report.expect(*(name for name, _, _ in KINDS))
    for name, kind, compiled in KINDS:
        obstacle = liger_loss_obstacle(device) if kind == "liger" else compile_obstacle(device) if compiled else None
        if obstacle is not None:
            part.report.line(f"{name}: {obstacle.reason}")
            part.report.done(name)
            continue
        found[name] = _one(kind, sizes, device, compiled=compiled)
        part.report.figure("losses", found)
        peak = found[name]["peak_gib"]
        memory = "" if peak is None else f", {peak:.2f} GiB above hidden states and head"
        part.report.line(f"{name}: {1000.0 * found[name]['seconds']['median']:.2f} ms{memory}")
        part.report.done(name)


def _one(kind: LossKind, sizes: dict[str, int], device: torch.device, *, compiled: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    hidden_BTD = torch.randn(sizes["B"], sizes["T"], sizes["D"], device=device, dtype=torch.bfloat16)  # noqa: N806
    head = nn.Linear(sizes["D"], sizes["V"], bias=False, device=device, dtype=torch.bfloat16)
    nn.init.normal_(head.weight, std=0.02)
    targets_BT = torch.randint(sizes["V"], (sizes["B"], sizes["T"]), device=device)  # noqa: N806 - shape suffix
    model: Any = _HeadOnly(hidden_BTD, head)
    attach_head_loss(model, kind, compiled=compiled)

    def step() -> None:
        loss, _ = model(input_ids=targets_BT, targets=targets_BT, factor=1.0 / targets_BT.numel())
        loss.backward()
        model.zero_grad(set_to_none=True)

    step()
    before = _reset_peak(device)
    seconds = timed_blocks(step, device)
    peak = None if before is None else (torch.cuda.max_memory_allocated() - before) / GIB
    return {"seconds": spread(seconds), "peak_gib": peak}


def _reset_peak(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()
