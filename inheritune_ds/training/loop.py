"""The training loop: one optimizer step after the other, with validation, checkpoints and a clean end."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from inheritune_ds.checkpoints.saver import Saver
from inheritune_ds.checkpoints.train_state import Requests, TrainState, batch_of, with_range
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.data.stream.batches import BatchStream
from inheritune_ds.distributed.coordination import agree
from inheritune_ds.distributed.watchdog import Watchdog
from inheritune_ds.distributed.world import World
from inheritune_ds.errors import StorageError, TrainingError
from inheritune_ds.training.engine import Engine, StepResult
from inheritune_ds.training.faults import FaultGuard
from inheritune_ds.training.peak_memory import peak_memory_gib
from inheritune_ds.training.prefetch import Prefetcher
from inheritune_ds.training.requests import Controls
from inheritune_ds.training.schedule import lr_ratio
from inheritune_ds.training.step_clock import StepClock
from inheritune_ds.training.validation import ValidationResult, Validator


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

    def rewind(self, step: int) -> None:
        """Forget what was recorded after a step: the run goes on from there again."""


@dataclass(frozen=True)
class LoopParts:
    """What the loop works with.

    Attributes:
        recipe: The experiment.
        engine: The target under DeepSpeed.
        stream: Batches by number.
        validator: Held-out windows.
        saver: Saves the state.
        restore: Brings the engine back to the newest verified checkpoint; all ranks call it. None if there is none.
        recorder: Metrics and progress line.
        controls: What this rank is asked for.
        watch: Ends the run when a phase hangs.
        world: This rank among all.
        eval_dir: Where validation results are written.
        micro_batch_size: Sequences per rank per micro-step.
        utilisation: Turns tokens/s into model FLOPs utilisation; None when the GPU or the shape is unknown.
        data_metrics: What has been read of every source in a state.
    """

    recipe: Recipe
    engine: Engine
    stream: BatchStream
    validator: Validator
    saver: Saver
    restore: Callable[[], TrainState | None]
    recorder: Recorder
    controls: Controls
    watch: Watchdog
    world: World
    eval_dir: Path
    micro_batch_size: int
    utilisation: Callable[[float], float] | None
    data_metrics: Callable[[TrainState], dict[str, float]]


@dataclass(frozen=True)
class LoopResult:
    """How the loop ended: at the last step, or stopped before; what was trained is saved by then."""

    state: TrainState
    finished: bool


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make every random draw of a step (dropout) a function of (seed, step, rank).

    A resumed run needs no saved generator state, and no step depends on how many draws came before it.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def train(parts: LoopParts, total_steps: int, state: TrainState | None) -> LoopResult:
    """Run from `state` (None: from the start) to `total_steps`, or until all ranks agree to stop.

    Raises:
        TrainingError: On all ranks: a validation loss is not finite, or faults have used up all rollbacks.
        StorageError: On all ranks: the state cannot be saved, and the run is about to end or must not go on.
    """
    batches = Prefetcher(
        lambda number: parts.stream.micro_batches(
            number, rank=parts.world.rank, world_size=parts.world.size, micro_batch_size=parts.micro_batch_size
        ),
        pin=parts.engine.device.type == "cuda",
    )
    try:
        return _Loop(parts, total_steps, batches, state or TrainState(validation_due=True)).run()
    finally:
        batches.close()


class _Loop:
    """One launch's way through the steps."""

    def __init__(self, parts: LoopParts, total_steps: int, batches: Prefetcher, state: TrainState) -> None:
        self._parts, self._total_steps, self._batches, self._state = parts, total_steps, batches, state
        self._guard = FaultGuard(parts.recipe.faults, state.faults)
        self._clock = StepClock(parts.recipe.training.global_batch_tokens)
        self._first, self._save_due = True, False
        self._told_saved = parts.saver.published_step

    def run(self) -> LoopResult:
        with self._parts.watch.phase("start", self._state.step):
            stop = self._stop_asked()
        if stop:  # while the engine was built; the state that the run was brought to is saved already
            self._honour(Requests(stop=True))
            return LoopResult(self._state, finished=False)
        if self._state.validation_due and not self._validate():
            if self._state.step:
                self._save(leaving=True)
            self._honour(Requests(stop=True))
            return LoopResult(self._state, finished=False)
        while self._state.step < self._total_steps:
            wishes = self._advance()
            if self._guard.must_roll_back:
                self._roll_back()
                continue
            last, step = self._state.step == self._total_steps, self._state.step
            validated = True
            if last or wishes.evaluate or step % self._parts.recipe.validation.interval_steps == 0:
                validated = self._validate()
            leaving = wishes.stop or not validated
            self._save_due |= step % self._parts.recipe.checkpoint.interval_steps == 0
            # Between faults a checkpoint would be what a rollback goes back to, with hardly other weights than now.
            if last or leaving or wishes.save or (self._save_due and not self._state.faults.in_a_row):
                self._save(leaving=last or leaving)
            self._honour(replace(wishes, stop=leaving))
            if leaving and not (last and validated):
                return LoopResult(self._state, finished=False)
        return LoopResult(self._state, finished=True)

    def _advance(self) -> Requests:
        """One optimizer step, logged; what the ranks have agreed on at its end."""
        parts, step = self._parts, self._state.step
        with parts.watch.phase("first_step" if self._first else "step", step + 1):
            seed_step(parts.recipe.seed, step, parts.world.rank)
            lr = parts.recipe.optimizer.lr * lr_ratio(parts.recipe.schedule, step, self._total_steps)
            result = parts.engine.train_step(self._take(), lr=lr, wishes=self._wishes(), judge=self._guard.judge)
            self._first = False
            self._clock.lap(result.passes_s, self._batches.waited_s)
            line = self._guard.note(result.loss, result.grad_norm, result.fault)
            self._state = replace(
                self._state,
                step=step + 1,
                tokens=self._state.tokens + parts.recipe.training.global_batch_tokens,
                skipped_steps=self._state.skipped_steps + (not result.applied),
                train_seconds=self._state.train_seconds + self._clock.last_s,
                faults=self._guard.state,
            )
            if line is not None:
                parts.recorder.say(f"step {step + 1}: {line}")
            parts.recorder.update(step + 1, result.loss, self._clock.tokens_per_s)
            if step + 1 == self._total_steps or (step + 1) % parts.recipe.logging.interval_steps == 0:
                self._log(result, lr)
            parts.controls.stepped(self._clock.last_s)
            self._tell_saved()
        return result.wishes

    def _wishes(self) -> Requests:
        """Of this rank; a save in the background that has failed for good is told by the next one, on all ranks."""
        wishes = self._parts.controls.wishes()
        return replace(wishes, save=True) if self._parts.saver.wants_save else wishes

    def _tell_saved(self) -> None:
        """Tell of a checkpoint that is published by now; one in the background is some steps later."""
        published = self._parts.saver.published_step
        if published is not None and published != self._told_saved:
            self._told_saved = published
            self._parts.controls.saved(self._parts.saver.last_save_s)
            self._parts.recorder.saved(published)

    def _take(self) -> list[torch.Tensor]:
        """The micro-batches of this step; those of the next are read from now on."""
        state = self._state
        following = batch_of(state.step + 1, state.skipped_batches) if state.step + 1 < self._total_steps else None
        with self._parts.watch.phase("data", state.step + 1):
            return self._batches.take(state.batch_number, following)

    def _honour(self, wishes: Requests) -> None:
        """Take back the wishes that are done; their files lie on a disk that may not answer."""
        with self._parts.watch.phase("log", self._state.step):
            self._parts.controls.acknowledge(wishes)

    def _stop_asked(self) -> bool:
        """Whether any rank was asked to stop; all ranks ask together."""
        return agree(self._parts.controls.wishes(), self._parts.engine.device).stop

    def _validate(self) -> bool:
        """Validate; False if a wish to stop came before the end, and `validation_due` then says so in the state."""
        parts, state = self._parts, self._state
        with self._clock.stopped(), parts.watch.phase("validation", state.step):
            result = parts.validator.validate_unless(self._stop_asked, parts.engine)
            self._state = state = replace(state, validation_due=result is None)
            if result is None:
                return False
            if not math.isfinite(result.loss):  # all ranks have the same losses, so they leave together
                raise TrainingError(
                    f"step {state.step}: the validation loss is {result.loss}",
                    allowed="a finite number",
                    action="lower optimizer.lr or lengthen schedule.warmup_steps; look for NaN in the weights if it is "
                    "step 0",
                )
            if parts.world.is_main:
                self._write(result)
                parts.recorder.log(
                    state.step,
                    state.tokens,
                    {"val/loss": result.loss, "val/stderr": result.stderr, "val/ppl": result.perplexity},
                )
                parts.recorder.say(f"step {state.step}: val loss {result.loss:.4f} +- {result.stderr:.4f}")
        return True

    def _write(self, result: ValidationResult) -> None:
        """Write the losses of all windows; before the last step a disk that refuses them ends nothing."""
        step = self._state.step
        try:
            result.write(self._parts.eval_dir / f"validation-step-{step:08d}.json", step=step)
        except StorageError as error:
            if step == self._total_steps:
                raise
            self._parts.recorder.say(f"WARNING: {error.problem}; the run goes on, and metrics.jsonl has the mean")

    def _save(self, *, leaving: bool) -> None:
        """Save; when leaving, the state must be on the disk before this returns."""
        parts, saver = self._parts, self._parts.saver
        with self._clock.stopped(), parts.watch.phase("save", self._state.step):
            saved, self._save_due = saver.save(parts.engine, self._state), False
            if leaving:
                saved = saver.wait() and saved
            self._tell_saved()
        if leaving and not saved:
            raise StorageError(
                f"step {self._state.step} could not be saved before leaving: {saver.refusal}",
                action="free some space, then give the same command again: it goes on from the checkpoint before",
            )

    def _roll_back(self) -> None:
        """Go back to the newest verified checkpoint, and skip the batches whose updates were left out."""
        parts, state, policy = self._parts, self._state, self._parts.recipe.faults
        bad = (
            batch_of(state.step - state.faults.in_a_row, state.skipped_batches),
            batch_of(state.step - 1, state.skipped_batches) + 1,
        )
        told = (
            f"step {state.step}: {state.faults.in_a_row} updates in a row were left out "
            f"(batches {bad[0]} to {bad[1] - 1})"
        )
        if state.faults.rollbacks >= policy.max_rollbacks:
            raise TrainingError(
                f"{told}, after {state.faults.rollbacks} rollbacks",
                allowed=f"faults.max_rollbacks: {policy.max_rollbacks}",
                action="look at these batches and at metrics.jsonl; lower optimizer.lr or lengthen "
                "schedule.warmup_steps in a new run; the same command tries again from the newest checkpoint",
            )
        with self._clock.stopped(), parts.watch.phase("save", state.step):
            parts.saver.wait()
            restored = parts.restore()
        if restored is None:
            raise TrainingError(
                f"{told}, and there is no checkpoint yet to go back to",
                allowed="a checkpoint before the first fault (checkpoint.interval_steps)",
                action="lower optimizer.lr, lengthen schedule.warmup_steps, or look at the data",
            )
        # A checkpoint may have been saved between the faults: what it has read already cannot be skipped any more.
        skipped = max(bad[0], batch_of(restored.step, state.skipped_batches)), bad[1]
        skipped_batches = with_range(state.skipped_batches, skipped) if skipped[0] < bad[1] else state.skipped_batches
        faults = replace(restored.faults, in_a_row=0, rollbacks=state.faults.rollbacks + 1)
        # A validation that was still due there has been done since, and its row is kept.
        self._state = replace(restored, skipped_batches=skipped_batches, faults=faults, validation_due=False)
        self._guard, self._save_due = FaultGuard(policy, faults), False
        with parts.watch.phase("log", restored.step):
            parts.recorder.rewind(restored.step)
        parts.recorder.say(
            f"WARNING: {told}; the run goes back to step {restored.step} and skips these batches "
            f"(rollback {faults.rollbacks} of {policy.max_rollbacks})"
        )

    def _log(self, result: StepResult, lr: float) -> None:
        parts, state, clock = self._parts, self._state, self._clock
        values = {
            "train/loss": result.loss,
            "train/lr": lr,
            "train/grad_norm": result.grad_norm,
            "train/skipped_steps": state.skipped_steps,
            "train/rollbacks": state.faults.rollbacks,
            "perf/tokens_per_s": clock.tokens_per_s,
            "perf/step_ms": 1000.0 * clock.mean_s,
            "perf/outside_ratio": clock.outside_ratio,
            "perf/data_wait_ratio": clock.data_wait_ratio,
            "mem/peak_gib": peak_memory_gib(),
            **parts.data_metrics(state),
        }
        if parts.utilisation is not None:
            values["perf/mfu"] = parts.utilisation(clock.tokens_per_s)
        # A step whose update was left out may have none; the line above has told its value.
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        with parts.watch.phase("log", state.step):
            parts.recorder.log(state.step, state.tokens, finite)
        clock.restart()
