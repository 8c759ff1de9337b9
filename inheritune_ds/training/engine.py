"""The only training use of DeepSpeed: initialise, one step, validation forward, full state.

Shapes: B sequences, T tokens a window, V vocabulary.
"""

import contextlib
import io
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from inheritune_ds.errors import MachineError, TrainingError
from inheritune_ds.surgery.document_masks import skip_packing_check
from inheritune_ds.training.block_wrapping import wrap_blocks
from inheritune_ds.training.captured_state import TAG, CapturedState, HostCopies, capture
from inheritune_ds.training.ds_keys import OURS
from inheritune_ds.training.elastic import load_by_name
from inheritune_ds.training.kernels import Kernels, apply_liger
from inheritune_ds.training.loss import attach_loss
from inheritune_ds.training.meeting import cannot_meet
from inheritune_ds.training.optimizer import build_optimizer, parameter_groups
from inheritune_ds.training.packing import DocumentPacking, WindowInputs, counted_targets, mean_losses, prove_apart
from inheritune_ds.training.toolchain import check_toolchain
from inheritune_ds.training.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Tokens = npt.NDArray[np.int64]
MasterWeights = Literal["refilled", "fp32 model"]
"""Where the fp32 master weights got the target's exact values: set after DeepSpeed had made them of half-precision
weights, or taken over from a model that is fp32 itself."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer update reports; equal on all ranks.

    Attributes:
        loss: Mean over all target tokens of the global batch, in nats.
        grad_norm: Norm of the whole gradient before clipping.
        applied: False if the engine left the update out (a non-finite gradient in half precision).
        stop: Whether any rank was asked to stop.
        passes_s: Seconds in forward and backward passes on this rank; DeepSpeed reduces the gradients in the last one.
    """

    loss: float
    grad_norm: float
    applied: bool
    stop: bool
    passes_s: float


def check_device(kind: str, world: World, *, offload: bool) -> None:
    """Refuse a machine that the run would fail on, before anything is prepared for it.

    Args:
        kind: `cuda` or `cpu`.
        world: This rank among all.
        offload: Whether state lies in host memory, which takes DeepSpeed's CPU operators.

    Raises:
        MachineError: If a C++ compiler is needed and does not work, if torch cannot use the machine's GPU, or if
            there are fewer GPUs than local ranks.
        StorageError: If the folder for the compiled operators cannot be written.
    """
    if kind == "cpu" or offload:
        from torch.utils.cpp_extension import get_default_build_root

        check_toolchain(os.environ, Path(get_default_build_root()))
    if kind != "cuda":
        return
    if not torch.cuda.is_available():
        raise MachineError(
            f"this machine has a GPU, but torch {torch.__version__} cannot use it",
            allowed="a CUDA build of torch and a driver that fits it",
            action="install one (docs/install.md), or set DS_ACCELERATOR=cpu to run on the CPU",
        )
    if torch.cuda.device_count() < world.local_size and world.launcher != "slurm":
        raise MachineError(
            f"{world.local_size} ranks on this machine, but torch sees {torch.cuda.device_count()} GPUs",
            allowed="one rank a GPU",
            action=f"start at most {torch.cuda.device_count()} ranks (deepspeed --num_gpus N)",
        )


def start_process_group(world: World) -> None:
    """Wait until all ranks are here; the first time, make them a group. DeepSpeed picks nccl or gloo.

    Raises:
        MachineError: If the ranks cannot meet.
    """
    if not dist.is_initialized():
        _make_group(world)
    dist.barrier()


def _make_group(world: World) -> None:
    if torch.cuda.is_available():
        # srun may show each rank its own GPU only; DeepSpeed takes the device from LOCAL_RANK.
        device = world.local_rank % torch.cuda.device_count()
        os.environ["LOCAL_RANK"] = str(device)
        torch.cuda.set_device(device)
    import deepspeed

    _quiet()
    try:
        deepspeed.init_distributed(dist_init_required=True, verbose=False)
    except dist.DistNetworkError as error:
        raise cannot_meet(error) from None


def leave_process_group() -> None:
    """Leave the group that `start_process_group` joined, if it did."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _quiet() -> None:
    """Leave DeepSpeed's warnings and errors; drop its progress chatter and its own deprecated calls."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.WARNING)


class Engine:
    """A target under DeepSpeed.

    Args:
        model: The target in fp32, holding the values to start from.
        ds_config: The resolved DeepSpeed config.
        world: This rank among all.
        kernels: What computes it.
        packing: How documents inside a window are kept apart; None if they are not.

    Raises:
        RecipeError: If documents are to be kept apart, and the model with these kernels does not.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        ds_config: Mapping[str, Any],
        world: World,
        kernels: Kernels,
        packing: DocumentPacking | None = None,
    ) -> None:
        import deepspeed

        self.world = world
        self.ds_config = ds_config
        low_precision = ds_config["bf16"]["enabled"] or ds_config["fp16"]["enabled"]
        # The engine rounds the model to half precision before it makes its fp32 masters of it.
        masters = {name: p.detach().clone() for name, p in model.named_parameters()} if low_precision else {}
        self.kernels, self.notes = _fit(model, kernels)
        self._windows = WindowInputs(packing, self.kernels.attention)
        model.train()
        # Its bf16 optimizer prints the memory it takes, group by group.
        with contextlib.redirect_stdout(sys.stdout if ds_config.get("memory_breakdown") else io.StringIO()):
            engine, *_ = deepspeed.initialize(
                model=model,
                config={key: value for key, value in ds_config.items() if key not in OURS},
                **_optimizer(model, ds_config, kernels),
            )
        _quiet()
        self._engine = engine
        self.module: torch.nn.Module = engine.module
        self._refill(masters)
        self.master_weights: MasterWeights = "refilled" if low_precision else "fp32 model"
        if packing is not None:
            self._prove_apart(model.config)

    def _prove_apart(self, config: "PreTrainedConfig") -> None:
        """Prove that the model keeps documents apart, with the kernels that it has now, but for compiled code."""
        dtype = next(self.module.parameters()).dtype
        self._engine.eval()
        # Compiling blocks for the few tokens of the proof would take longer than all the rest of the start.
        with torch.compiler.set_stance("force_eager"):
            prove_apart(self._windows, lambda given: self._engine(**given).logits.float(), config, self.device, dtype)
        self._engine.train()

    def _refill(self, masters: Mapping[str, torch.Tensor]) -> None:
        """Give the fp32 masters the checkpoint's values instead of the rounded ones."""
        from deepspeed.utils import safe_set_full_fp32_param

        for name, parameter in self.module.named_parameters():
            if name in masters:
                safe_set_full_fp32_param(parameter, masters[name].to(self.device))

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return torch.device(self._engine.device)

    def train_step(self, micro_batches: Sequence[torch.Tensor], *, lr: float, stop: bool) -> StepResult:
        """One optimizer update over the micro-batches of this rank.

        Args:
            micro_batches: Host tensors (micro_batch_size, T + 1) of token ids (int64); where a negative id stands, no
                loss is counted for it.
            lr: Learning rate of this update.
            stop: Whether this rank was asked to stop; any rank's wish becomes everybody's.

        Raises:
            TrainingError: On all ranks together, before the update, if the loss is not finite; after it,
                if the gradient was not and the engine applied it all the same.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        global_tokens = self._count_targets(micro_batches)
        # The engine averages over the ranks; undo it, so that every token of the global batch weighs the same.
        factor = self.world.size / global_tokens
        # [sum of the token losses, ranks that want to stop]; in fp64, so that summing adds no error.
        totals = torch.tensor([0.0, float(stop)], dtype=torch.float64, device=self.device)
        clock = _PassClock(self.device)
        loss = math.nan
        for number, batch in enumerate(micro_batches, 1):
            inputs = self._windows.with_targets(batch, self.device)
            with clock, self._windows.apart():
                scaled, loss_sum = self._engine(**inputs, factor=factor)
                totals[0] += loss_sum
                # A new node: the engine must mark the graph as scaled before its hook on the output looks at it.
                self._engine.backward(scaled.view_as(scaled), scale_wrt_gas=False)
            if number == len(micro_batches):
                dist.all_reduce(totals)
                loss = float(totals[0]) / global_tokens
                if not math.isfinite(loss):
                    raise _non_finite("loss", loss, self._engine.global_steps + 1)
            self._engine.step()
        applied = bool(self._engine.was_step_applied())
        grad_norm = float(self._engine.get_global_grad_norm())
        if applied and not math.isfinite(grad_norm):
            raise _non_finite("gradient norm", grad_norm, self._engine.global_steps)
        return StepResult(loss, grad_norm, applied, stop=float(totals[1]) > 0, passes_s=clock.seconds())

    def _count_targets(self, micro_batches: Sequence[torch.Tensor]) -> int:
        """Target tokens of the global batch that a loss is counted for."""
        packing = self._windows.packing
        own = sum(int(counted_targets(batch, packing).sum()) for batch in micro_batches)
        count = torch.tensor(own, device=self.device)
        if self.world.size > 1:
            dist.all_reduce(count)
        return max(int(count), 1)

    def logits(self, tokens_BT: torch.Tensor) -> torch.Tensor:  # noqa: N803 - shape suffix
        """Forward pass: fp32 logits of shape (B, T, V)."""
        output: torch.Tensor = self._engine(input_ids=tokens_BT, use_cache=False).logits
        return output.float()

    @torch.no_grad()
    def window_losses(self, batches: Sequence[Tokens]) -> list[npt.NDArray[np.float64]]:
        """Mean loss of every window over its counted targets, in nats a token; all ranks must give as many batches.

        Args:
            batches: Arrays (B, T + 1) of token ids.
        """
        self._engine.eval()
        try:
            with self._windows.apart():
                return [self._mean_losses(torch.from_numpy(batch)) for batch in batches]
        finally:
            self._engine.train()

    def _mean_losses(self, tokens_BT1: torch.Tensor) -> npt.NDArray[np.float64]:  # noqa: N803 - shape suffix
        losses = self._engine(**self._windows.with_targets(tokens_BT1, self.device))
        return mean_losses(losses, tokens_BT1, self._windows.packing)

    @torch.no_grad()
    def probe_logits(self, tokens: Tokens) -> torch.Tensor:
        """Logits of the last state on the CPU, in evaluation mode; all ranks must call it."""
        self._engine.eval()
        try:
            return self.logits(torch.from_numpy(tokens).to(self.device)).cpu()
        finally:
            self._engine.train()

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter's fp32 master as a whole tensor on the CPU; all ranks must iterate together."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.module.named_parameters():
            yield name, safe_get_full_fp32_param(parameter).float().cpu()

    def capture(self, copies: HostCopies | None = None) -> CapturedState:
        """Take this rank's share of the state, to be written to files; all ranks must call it.

        Args:
            copies: Where to copy the tensors to; None: they must be written before the next step.
        """
        from deepspeed.checkpoint import constants

        # What its conversion to the universal format asks for; it leaves this to its client.
        universal = {constants.UNIVERSAL_CHECKPOINT_VERSION_KEY: constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE}
        return capture(self._engine, {constants.UNIVERSAL_CHECKPOINT_INFO: universal}, copies)

    def load(self, folder: Path) -> tuple[str, ...]:
        """Restore a saved state, of any number of ranks and any ZeRO stage; all ranks must call it.

        Args:
            folder: A verified checkpoint.

        Returns:
            A line on every setting that rounds otherwise than when it was saved.

        Raises:
            CheckpointError: If it is not a state of this model.
        """
        return load_by_name(self._engine, folder / TAG)

    def close(self) -> None:
        """Give the memory of the engine back, so that another can follow in this process."""
        self._engine.destroy()


def _fit(model: "PreTrainedModel", kernels: Kernels) -> tuple[Kernels, tuple[str, ...]]:
    """Put the kernels into a model; returns what it took, and a line on each that it could not."""
    skip_packing_check()
    # First: it runs the model, which is still on the CPU in fp32, where neither Liger nor flash attention work.
    taken, reason = attach_loss(model, kernels.loss, compiled=kernels.compile)
    model.set_attn_implementation(kernels.attention)
    if kernels.liger:
        apply_liger(model)
    wrap_blocks(model, compiled=kernels.compile, activation_checkpointing=kernels.activation_checkpointing)
    return replace(kernels, loss=taken), (f"kernels.loss: {taken} ({reason})",) if reason else ()


def _optimizer(model: "PreTrainedModel", ds_config: Mapping[str, Any], kernels: Kernels) -> dict[str, Any]:
    """What `deepspeed.initialize` is given of the optimizer: a client's, or the groups for its own (offload)."""
    params = ds_config["optimizer"]["params"]
    groups = [
        {key: value for key, value in group.items() if key != "names"}
        for group in parameter_groups(model, params["weight_decay"])
        if group["params"]
    ]
    optimizer = build_optimizer(
        kernels.optimizer, groups, lr=params["lr"], betas=tuple(params["betas"]), eps=params["eps"]
    )
    return {"model_parameters": groups} if optimizer is None else {"optimizer": optimizer}


class _PassClock:
    """Adds up the time of the passes: wall clock on a CPU, events on a GPU, whose passes end after their call."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *_: object) -> None:
        self._spans.append((self._start, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self) -> float:
        """The sum; on a GPU it waits for the last pass."""
        if not self._cuda:
            return float(sum(end - start for start, end in self._spans))
        if self._spans:
            self._spans[-1][1].synchronize()
        return float(sum(start.elapsed_time(end) for start, end in self._spans)) / 1000.0


def _non_finite(what: str, value: float, step: int) -> TrainingError:
    return TrainingError(
        f"the {what} of step {step} is {value}: nothing after it would be worth having",
        allowed="a finite number",
        action="look at the last lines of metrics.jsonl; lower optimizer.lr or lengthen schedule.warmup_steps, "
        "or start again from the last checkpoint with the same command",
    )
