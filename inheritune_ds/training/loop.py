"""The training loop: one optimizer step after the other, with validation, checkpoints and a clean end."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from inheritune_ds.data.stream import BatchStream
from inheritune_ds.errors import TrainingError
from inheritune_ds.recipe import Recipe
from inheritune_ds.training.checkpoints import Checkpoints, RunState
from inheritune_ds.training.engine import Engine, StepResult
from inheritune_ds.training.peak_memory import peak_memory_gib
from inheritune_ds.training.read_ahead import ReadAhead
from inheritune_ds.training.schedule import lr_ratio
from inheritune_ds.training.validation import ValidationResult, Validator
from inheritune_ds.training.world import StopSignal, World


class Recorder(Protocol):
    """Takes what the loop reports; only rank 0 has one that does anything."""

    def log(self, step: int, tokens: int, values: dict[str, float]) -> None:
        """Record metrics at a step."""

    def update(self, step: int, loss: float, tokens_per_s: float) -> None:
        """Move the progress line."""

    def say(self, line: str) -> None:
        """Print one line."""

    def saved(self, step: int) -> None:
        """Note that the run can go on from a step."""


@dataclass(frozen=True)
class LoopParts:
    """What the loop works with.

    Attributes:
        recipe: The experiment.
        engine: The target under DeepSpeed.
        stream: Batches by step.
        validator: Held-out windows.
        checkpoints: Where the state goes.
        recorder: Metrics and progress line.
        stop: Signals of this rank.
        world: This rank among all.
        eval_dir: Where validation results are written.
        micro_batch_size: Sequences per rank per micro-step.
        utilisation: Turns tokens/s into model FLOPs utilisation; None when the GPU or the shape is unknown.
        data_metrics: What has been read of every source after a number of steps.
    """

    recipe: Recipe
    engine: Engine
    stream: BatchStream
    validator: Validator
    checkpoints: Checkpoints
    recorder: Recorder
    stop: StopSignal
    world: World
    eval_dir: Path
    micro_batch_size: int
    utilisation: Callable[[float], float] | None
    data_metrics: Callable[[int], dict[str, float]]


@dataclass(frozen=True)
class LoopResult:
    """How the loop ended: at the last step, or stopped before."""

    state: RunState
    finished: bool


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make every random draw of a step (dropout) a function of (seed, step, rank).

    A resumed run needs no saved generator state, and no step depends on how many draws came before it.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def train(parts: LoopParts, total_steps: int, state: RunState | None) -> LoopResult:
    """Run from `state` (None: from the start) to `total_steps`, or until a signal stops all ranks."""
    batches = ReadAhead(
        lambda step: parts.stream.micro_batches(
            step, rank=parts.world.rank, world_size=parts.world.size, micro_batch_size=parts.micro_batch_size
        ),
        end=total_steps,
        pin=parts.engine.device.type == "cuda",
    )
    try:
        return _train(parts, total_steps, state, batches)
    finally:
        batches.close()


def _train(parts: LoopParts, total_steps: int, state: RunState | None, batches: ReadAhead) -> LoopResult:
    recipe = parts.recipe
    if state is None:
        state = RunState(step=0, tokens=0, skipped_steps=0, train_seconds=0.0)
        _validate(parts, state)
    clock = _Clock(recipe.training.global_batch_tokens)
    while state.step < total_steps:
        step = state.step
        seed_step(recipe.seed, step, parts.world.rank)
        lr = recipe.optimizer.lr * lr_ratio(recipe.schedule, step, total_steps)
        result = parts.engine.train_step(batches.take(step), lr=lr, stop=parts.stop.requested is not None)
        clock.lap(result.passes_s, batches.waited_s)
        state = replace(
            state,
            step=step + 1,
            tokens=state.tokens + recipe.training.global_batch_tokens,
            skipped_steps=state.skipped_steps + (not result.applied),
            train_seconds=state.train_seconds + clock.last_s,
        )
        if not result.applied:
            parts.recorder.say(f"step {state.step}: update left out, the gradient was not finite")
        parts.recorder.update(state.step, result.loss, clock.tokens_per_s)
        last = state.step == total_steps
        if last or state.step % recipe.logging.interval_steps == 0:
            _log(parts, state, result, lr, clock)
        if last or state.step % recipe.validation.interval_steps == 0:
            with clock.stopped():
                _validate(parts, state)
        if last or result.stop or state.step % recipe.checkpoint.interval_steps == 0:
            with clock.stopped():
                parts.checkpoints.save(parts.engine, state)
            parts.recorder.saved(state.step)
        if result.stop and not last:
            return LoopResult(state, finished=False)
    return LoopResult(state, finished=True)


def _validate(parts: LoopParts, state: RunState) -> ValidationResult:
    result = parts.validator.validate(parts.engine)
    if not math.isfinite(result.loss):  # all ranks have the same losses, so they leave together
        raise TrainingError(
            f"step {state.step}: the validation loss is {result.loss}",
            allowed="a finite number",
            action="lower optimizer.lr or lengthen schedule.warmup_steps; look for NaN in the weights if it is step 0",
        )
    if parts.world.is_main:
        result.write(parts.eval_dir / f"validation-step-{state.step:08d}.json", step=state.step)
        parts.recorder.log(
            state.step,
            state.tokens,
            {"val/loss": result.loss, "val/stderr": result.stderr, "val/ppl": result.perplexity},
        )
        parts.recorder.say(f"step {state.step}: val loss {result.loss:.4f} +- {result.stderr:.4f}")
    return result


def _log(parts: LoopParts, state: RunState, result: StepResult, lr: float, clock: "_Clock") -> None:
    values = {
        "train/loss": result.loss,
        "train/lr": lr,
        "train/grad_norm": result.grad_norm,
        "train/skipped_steps": state.skipped_steps,
        "perf/tokens_per_s": clock.tokens_per_s,
        "perf/step_ms": 1000.0 * clock.mean_s,
        "perf/outside_ratio": clock.outside_ratio,
        "perf/data_wait_ratio": clock.data_wait_ratio,
        "mem/peak_gib": peak_memory_gib(),
        **parts.data_metrics(state.step),
    }
    if parts.utilisation is not None:
        values["perf/mfu"] = parts.utilisation(clock.tokens_per_s)
    parts.recorder.log(state.step, state.tokens, values)
    clock.restart()


class _Clock:
    """Time of optimizer steps since the last logged one, from the end of one to the end of the next.

    Validation and checkpoints do not count; what the loop itself does between the steps, logging among it, does.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._waited_s = 0.0
        self.last_s = 0.0
        self.restart()
        self._mark_s = time.perf_counter()

    def restart(self) -> None:
        self._sum_s, self._passes_s, self._wait_s, self._steps = 0.0, 0.0, 0.0, 0

    def lap(self, passes_s: float, waited_s: float) -> None:
        """End a step that had so much time in its passes; `waited_s` is the wait for data since the start."""
        # The step ends with the loss and the gradient norm on the host, so the device has caught up.
        now = time.perf_counter()
        self.last_s, self._mark_s = now - self._mark_s, now
        self._sum_s += self.last_s
        self._passes_s += passes_s
        self._wait_s += waited_s - self._waited_s
        self._waited_s = waited_s
        self._steps += 1

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Do not count what happens inside."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self._mark_s += time.perf_counter() - start_s

    @property
    def mean_s(self) -> float:
        return self._sum_s / max(self._steps, 1)

    @property
    def tokens_per_s(self) -> float:
        return self._tokens / self.mean_s if self._steps else 0.0

    @property
    def outside_ratio(self) -> float:
        return 1.0 - self._passes_s / self._sum_s if self._steps else 0.0

    @property
    def data_wait_ratio(self) -> float:
        return self._wait_s / self._sum_s if self._steps else 0.0
