"""Train a target with DeepSpeed: initialization, one step, validation losses, full state.

Shapes: B sequences, T tokens a window, V vocabulary.
"""

import contextlib
import io
import math
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch

from inheritune_ds.checkpoints import snapshot
from inheritune_ds.checkpoints.manifest import Checkpoint
from inheritune_ds.checkpoints.train_state import Requests
from inheritune_ds.config.deepspeed_keys import without_ours
from inheritune_ds.distributed.process_group import quiet
from inheritune_ds.distributed.world import World
from inheritune_ds.surgery.meta_model import mapped_tensors
from inheritune_ds.training.block_wrapping import wrap_blocks
from inheritune_ds.training.document_masks import skip_packing_check
from inheritune_ds.training.faults import not_finite
from inheritune_ds.training.kernels import Kernels, apply_liger
from inheritune_ds.training.loss import attach_loss
from inheritune_ds.training.optimizer import build_optimizer, import_muon, parameter_groups, without_names
from inheritune_ds.training.packing import DocumentPacking, WindowInputs, losses_by_window, prove_apart
from inheritune_ds.training.padded_attention import pad_heads
from inheritune_ds.training.step_clock import PassClock
from inheritune_ds.training.update_gate import Judge, UpdateGate, agreed, count_targets, totals

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Tokens = npt.NDArray[np.int64]
MasterWeights = Literal["refilled", "fp32 model"]
"""Source of the master weights' exact values: refilled after DeepSpeed made them of half-precision weights, or the
fp32 model itself."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer update reports; equal on all ranks, except `passes_s`.

    Attributes:
        loss: Mean over all target tokens of the global batch, in nats.
        grad_norm: Norm of the whole gradient before clipping; infinite if an element is not finite.
        applied: False if the update was skipped; weights and moments are then unchanged, bit for bit.
        fault: Why it was skipped; None if it was applied, or if only fp16's loss scale was too large.
        requests: Requests to any rank.
        passes_s: Seconds in forward and backward passes on this rank; the last one includes DeepSpeed's reduction.
    """

    loss: float
    grad_norm: float
    applied: bool
    fault: str | None
    requests: Requests
    passes_s: float


class Engine:
    """A target under DeepSpeed.

    Args:
        model: The target in fp32, with its initial values; under ZeRO-3 also as `load_target` partitions it.
        ds_config: Resolved.
        world: This rank among all.
        kernels: As `choose_kernels` returns them.
        packing: How documents inside a window are kept apart; None if they are not.
        target: The folder that the model was loaded from, to fill the masters from; None: from the model itself.
        carried: Names of the parameters whose optimizer state `carry` will bring.

    Raises:
        RecipeError: If the model with these kernels does not keep documents apart.
    """

    def __init__(  # noqa: PLR0913 - the model, where it is from, and what computes it
        self,
        model: "PreTrainedModel",
        ds_config: Mapping[str, Any],
        world: World,
        kernels: Kernels,
        packing: DocumentPacking | None = None,
        *,
        target: Path | None = None,
        carried: Collection[str] = (),
    ) -> None:
        import deepspeed

        import_muon()
        self.world = world
        low_precision = ds_config["bf16"]["enabled"] or ds_config["fp16"]["enabled"]
        # DeepSpeed rounds the model to half precision before it makes fp32 masters of it, in new memory. These keep the
        # exact values.
        exact: Iterable[tuple[str, torch.Tensor]] = ()
        if low_precision:
            exact = (
                [(name, parameter.detach()) for name, parameter in model.named_parameters()]
                if target is None
                else mapped_tensors(target)
            )
        self.kernels, self.notes = _fit(model, kernels)
        self._windows = WindowInputs(packing, self.kernels.attention)
        model.train()
        # DeepSpeed's bf16 optimizer prints the memory of each group.
        with contextlib.redirect_stdout(sys.stdout if ds_config.get("memory_breakdown") else io.StringIO()):
            engine, *_ = deepspeed.initialize(
                model=model,
                config=without_ours(ds_config),
                **_optimizer(model, ds_config, kernels, carried),
            )
        quiet()
        self._engine = engine
        self._gate = UpdateGate(engine.optimizer, world.size)
        self.module: torch.nn.Module = engine.module
        embedding: Any = model.get_input_embeddings()
        self._vocabulary: int = embedding.num_embeddings
        if low_precision:
            snapshot.fill_masters(engine, exact)
        self.master_weights: MasterWeights = "refilled" if low_precision else "fp32 model"
        if packing is not None:
            self._prove_apart(model.config)

    def _prove_apart(self, config: "PreTrainedConfig") -> None:
        """Prove that the model keeps documents apart with its kernels, uncompiled."""
        dtype = next(self.module.parameters()).dtype
        # Compiling blocks for the few tokens of the proof would take longer than the rest of the start.
        with self._evaluating(), torch.compiler.set_stance("force_eager"):
            prove_apart(self._windows, lambda given: self._engine(**given).logits.float(), config, self.device, dtype)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        self._engine.eval()
        try:
            yield
        finally:
            self._engine.train()

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return torch.device(self._engine.device)

    def train_step(
        self,
        micro_batches: Sequence[torch.Tensor],
        *,
        lr: float,
        requests: Requests = Requests(),  # noqa: B008 - immutable
        judge: Judge = not_finite,
    ) -> StepResult:
        """One optimizer update over the micro-batches of this rank.

        Args:
            micro_batches: Host tensors (micro_batch_size, T + 1) of token ids (int64); negative ids have no loss.
            lr: Learning rate of this update.
            requests: Requests to this rank; a request to any rank counts for all.
            judge: Called before the update; a returned text skips the update on all ranks.

        Raises:
            CorpusError: On all ranks together, before the passes, if a token id is not in the vocabulary.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        where: dict[str, Any] = {"ranks": self.world.size, "device": self.device, "step": self._engine.global_steps + 1}
        global_tokens = count_targets(micro_batches, self._windows.packing, vocabulary=self._vocabulary, **where)
        # The engine averages over the ranks; this undoes it, so that all tokens of the global batch weigh the same.
        factor = self.world.size / global_tokens
        sums = totals(requests, self.device)
        clock = PassClock(self.device)
        loss = math.nan
        for number, batch in enumerate(micro_batches, 1):
            inputs = self._windows.with_targets(batch, self.device)
            with clock, self._windows.apart():
                scaled, loss_sum = self._engine(**inputs, factor=factor)
                sums[0] += loss_sum
                # A new node: the engine must mark the graph as scaled before its hook on the output runs.
                self._engine.backward(scaled.view_as(scaled), scale_wrt_gas=False)
            if number == len(micro_batches):
                total, requests = agreed(sums)
                loss = total / global_tokens
                self._gate.expect(loss, judge)
            self._engine.step()
        applied, gate = bool(self._engine.was_step_applied()), self._gate
        return StepResult(loss, gate.grad_norm, applied, gate.fault, requests, clock.seconds())

    @torch.no_grad()
    def window_losses(self, batches: Sequence[Tokens]) -> list[npt.NDArray[np.float32]]:
        """Loss (B, T) of every target, in nats, 0 if not counted; all ranks must pass as many batches.

        Args:
            batches: Arrays (B, T + 1) of token ids.
        """
        with self._evaluating(), self._windows.apart():
            return [self._losses(torch.from_numpy(batch)) for batch in batches]

    def _losses(self, tokens_BT1: torch.Tensor) -> npt.NDArray[np.float32]:
        return losses_by_window(self._engine(**self._windows.with_targets(tokens_BT1, self.device)), tokens_BT1)

    @torch.no_grad()
    def probe_logits(self, tokens: Tokens) -> torch.Tensor:
        """Logits (B, T, V) in fp32 on the CPU, in evaluation mode; all ranks must call it."""
        with self._evaluating():
            output = self._engine(input_ids=torch.from_numpy(tokens).to(self.device), use_cache=False)
            return cast("torch.Tensor", output.logits).float().cpu()

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter's fp32 master as a whole tensor on the CPU; all ranks must iterate together."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.module.named_parameters():
            yield name, safe_get_full_fp32_param(parameter).float().cpu()

    def capture(self, buffers: snapshot.PinnedBuffers | None = None) -> snapshot.Snapshot:
        """Capture this rank's share of the state; without buffers it must be written before the next step."""
        return snapshot.capture(self._engine, buffers)

    def load(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """Restore a verified checkpoint of any number of ranks and any ZeRO stage; all ranks must call it.

        Returns:
            Log lines on changes since it was saved: ranks, stage, and settings that round differently.

        Raises:
            CheckpointError: If it is not a state of this model.
        """
        return snapshot.restore(self._engine, checkpoint)

    def carry(self, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
        """Take moments and numbers of updates from another model's checkpoint (`snapshot.carry`)."""
        snapshot.carry(self._engine, checkpoint, names)

    def close(self) -> None:
        """Free the engine's memory for another engine in this process."""
        self._engine.destroy()


def _fit(model: "PreTrainedModel", kernels: Kernels) -> tuple[Kernels, tuple[str, ...]]:
    """Apply the kernels to a model; returns those it took, and a log line on each that it could not take."""
    skip_packing_check()
    pad_heads()
    taken, reason = attach_loss(model, kernels.loss, compiled=kernels.compile)
    model.set_attn_implementation(kernels.attention)
    if kernels.liger:
        apply_liger(model)
    wrap_blocks(model, compiled=kernels.compile, activation_checkpointing=kernels.activation_checkpointing)
    return replace(kernels, loss=taken), (f"kernels.loss: {taken} ({reason})",) if reason else ()


def _optimizer(
    model: "PreTrainedModel", ds_config: Mapping[str, Any], kernels: Kernels, carried: Collection[str]
) -> dict[str, Any]:
    """Arguments of `deepspeed.initialize`: a client optimizer, or the groups for DeepSpeed's own (offload)."""
    params = ds_config["optimizer"]["params"]
    groups = parameter_groups(model, params["weight_decay"], carried)
    optimizer = build_optimizer(
        kernels.optimizer, groups, lr=params["lr"], betas=tuple(params["betas"]), eps=params["eps"]
    )
    return {"model_parameters": without_names(groups)} if optimizer is None else {"optimizer": optimizer}
