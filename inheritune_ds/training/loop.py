"""The training loop: one optimizer step after the other, with periodic tasks, checkpoints and a clean end."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from inheritune_ds.checkpoints.saver import Saver
from inheritune_ds.checkpoints.train_state import Requests, TrainState, batch_of
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.data.stream.batches import BatchStream
from inheritune_ds.distributed.coordination import agree
from inheritune_ds.distributed.watchdog import Watchdog
from inheritune_ds.distributed.world import World
from inheritune_ds.errors import StorageError, TrainingError
from inheritune_ds.tracking.recorder import Recorder
from inheritune_ds.training.engine import Engine, StepResult
from inheritune_ds.training.faults import FaultGuard, faulty_batches, rolled_back
from inheritune_ds.training.peak_memory import peak_memory_gib
from inheritune_ds.training.prefetch import Prefetcher
from inheritune_ds.training.requests import Controls
from inheritune_ds.training.schedule import lr_ratio
from inheritune_ds.training.step_clock import StepClock
from inheritune_ds.training.validation import ValidationTask, Validator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Periodic:
    """Work at the end of every n-th step and of the last one; its time does not count as training.

    Attributes:
        every: n, in steps.
        run: The work; all ranks call it together. It is given the state and a function by which all ranks ask together
            whether to stop. If it returns False, it has stopped for that: the run saves and leaves, and the next launch
            repeats the work of this step.
        phase: The phase that the watchdog takes it for.
    """

    every: int
    run: Callable[[TrainState, Callable[[], bool]], bool]
    phase: str = "validation"


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
        tasks: Work after the validation of a step and before its checkpoint.
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
    tasks: Sequence[Periodic] = ()


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
        self._reported_step = parts.saver.published_step
        eval_dir = parts.eval_dir if parts.world.is_main else None
        task = ValidationTask(parts.validator, parts.engine, parts.recorder, eval_dir, total_steps)
        self._validation = Periodic(parts.recipe.validation.interval_steps, task.run)

    def run(self) -> LoopResult:
        if not self._start():
            self._acknowledge(Requests(stop=True))
            return LoopResult(self._state, finished=False)
        while self._state.step < self._total_steps:
            requests = self._advance()
            if self._guard.must_roll_back:
                self._roll_back()
            elif not self._end_step(requests):
                return LoopResult(self._state, finished=False)
        return LoopResult(self._state, finished=True)

    def _start(self) -> bool:
        """Run the tasks that are still due; False if a request to stop comes before their end."""
        with self._parts.watch.phase("start", self._state.step):
            stop = self._stop_requested()
        if stop:  # while the engine was built; the state that the run was brought to is saved already
            return False
        if not self._state.validation_due or self._run_tasks(validate=True):
            return True
        if self._state.step:
            self._save(leaving=True)
        return False

    def _advance(self) -> Requests:
        """One optimizer step, logged; what the ranks have agreed on at its end."""
        parts, step = self._parts, self._state.step
        with parts.watch.phase("first_step" if self._first else "step", step + 1):
            seed_step(parts.recipe.seed, step, parts.world.rank)
            lr = parts.recipe.optimizer.lr * lr_ratio(parts.recipe.schedule, step, self._total_steps)
            result = parts.engine.train_step(self._take(), lr=lr, requests=self._requests(), judge=self._guard.judge)
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
                logger.info("step %d: %s", step + 1, line)
            parts.recorder.update(step + 1, result.loss, self._clock.tokens_per_s)
            if self._is_due(parts.recipe.logging.interval_steps):
                self._log(result, lr)
            parts.controls.stepped(self._clock.last_s)
            self._report_saved()
        return result.requests

    def _end_step(self, requests: Requests) -> bool:
        """Run the tasks of a step, save, delete the files of handled requests; whether to do the next step."""
        complete = self._run_tasks(validate=requests.evaluate)
        last, leaving = self._state.step == self._total_steps, requests.stop or not complete
        self._save_due |= self._is_due(self._parts.recipe.checkpoint.interval_steps)
        # Between faults a checkpoint would be what a rollback goes back to, with hardly other weights than now.
        if last or leaving or requests.save or (self._save_due and not self._state.faults.in_a_row):
            self._save(leaving=last or leaving)
        self._acknowledge(replace(requests, stop=leaving))
        return complete if last else not leaving

    def _is_due(self, every: int) -> bool:
        """Whether this step is the last or one of every so many."""
        return self._state.step == self._total_steps or self._state.step % every == 0

    def _run_tasks(self, *, validate: bool) -> bool:
        """Run the tasks that are due at this step, the validation also if asked; False if a request to stop came."""
        tasks = [task for task in (self._validation, *self._parts.tasks) if self._is_due(task.every)]
        if validate and self._validation not in tasks:
            tasks.insert(0, self._validation)
        complete = all(self._run_task(task) for task in tasks)
        self._state = replace(self._state, validation_due=not complete)
        return complete

    def _run_task(self, task: Periodic) -> bool:
        with self._clock.stopped(), self._parts.watch.phase(task.phase, self._state.step):
            return task.run(self._state, self._stop_requested)

    def _requests(self) -> Requests:
        """Of this rank; a failed async save forces a save, so that all ranks raise its error together."""
        requests = self._parts.controls.requests()
        return replace(requests, save=True) if self._parts.saver.wants_save else requests

    def _report_saved(self) -> None:
        """Report a checkpoint that is published by now; an async one is some steps later."""
        published = self._parts.saver.published_step
        if published is not None and published != self._reported_step:
            self._reported_step = published
            self._parts.controls.saved(self._parts.saver.last_save_s)
            self._parts.recorder.saved(published)

    def _take(self) -> list[torch.Tensor]:
        """The micro-batches of this step; those of the next are read from now on."""
        state = self._state
        following = batch_of(state.step + 1, state.skipped_batches) if state.step + 1 < self._total_steps else None
        with self._parts.watch.phase("data", state.step + 1):
            return self._batches.take(state.batch_number, following)

    def _acknowledge(self, requests: Requests) -> None:
        """Delete the files of handled requests; they are on a disk that may not answer."""
        with self._parts.watch.phase("log", self._state.step):
            self._parts.controls.acknowledge(requests)

    def _stop_requested(self) -> bool:
        """Whether any rank was asked to stop; all ranks ask together."""
        return agree(self._parts.controls.requests().stop, self._parts.engine.device)

    def _save(self, *, leaving: bool) -> None:
        """Save; when leaving, the state must be on the disk before this returns."""
        parts, saver = self._parts, self._parts.saver
        with self._clock.stopped(), parts.watch.phase("save", self._state.step):
            saved, self._save_due = saver.save(parts.engine, self._state), False
            if leaving:
                saved = saver.wait() and saved
            self._report_saved()
        if leaving and not saved:
            raise StorageError(
                f"step {self._state.step} could not be saved before leaving: {saver.refusal}",
                action="free some space, then give the same command again: it goes on from the checkpoint before",
            )

    def _roll_back(self) -> None:
        """Go back to the newest verified checkpoint, and skip the batches whose updates were left out."""
        parts, state, policy = self._parts, self._state, self._parts.recipe.faults
        first, end = faulty_batches(state)
        reason = (
            f"step {state.step}: {state.faults.in_a_row} updates in a row were left out (batches {first} to {end - 1})"
        )
        if state.faults.rollbacks >= policy.max_rollbacks:
            raise TrainingError(
                f"{reason}, after {state.faults.rollbacks} rollbacks",
                allowed=f"faults.max_rollbacks: {policy.max_rollbacks}",
                action="look at these batches and at metrics.jsonl; lower optimizer.lr or lengthen "
                "schedule.warmup_steps in a new run; the same command tries again from the newest checkpoint",
            )
        with self._clock.stopped(), parts.watch.phase("save", state.step):
            parts.saver.wait()
            restored = parts.restore()
        if restored is None:
            raise TrainingError(
                f"{reason}, and there is no checkpoint yet to go back to",
                allowed="a checkpoint before the first fault (checkpoint.interval_steps)",
                action="lower optimizer.lr, lengthen schedule.warmup_steps, or look at the data",
            )
        self._state = rolled_back(state, restored)
        self._guard, self._save_due = FaultGuard(policy, self._state.faults), False
        with parts.watch.phase("log", restored.step):
            parts.recorder.rewind(restored.step)
        logger.warning(
            "%s; the run goes back to step %d and skips these batches (rollback %d of %d)",
            reason,
            restored.step,
            self._state.faults.rollbacks,
            policy.max_rollbacks,
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
        with parts.watch.phase("log", state.step):
            parts.recorder.log(state.step, state.tokens, values)
        clock.restart()
