"""The training loop: optimizer steps, periodic tasks, checkpoints, rollbacks and requests to stop."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
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
        run: The work; all ranks call it together. It takes the state and a function that all ranks call together to ask
            whether to stop. It returns False if it stopped early: the run then saves and exits, and the next launch
            repeats the work of this step.
        phase: The watchdog's.
    """

    every: int
    run: Callable[[TrainState, Callable[[], bool]], bool]
    phase: str = "validation"


@dataclass(frozen=True)
class LoopParts:
    """The objects of the loop.

    Attributes:
        restore: Restores the newest verified checkpoint and returns its state, or None without one; all ranks call it.
        eval_dir: Folder of the validation results.
        micro_batch_size: Sequences per rank per micro-step.
        utilization: Model FLOPs utilization for tokens/s, None if it is impossible; None when the GPU or the shape is
            unknown.
        data_metrics: Metrics of every source in a state.
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
    utilization: Callable[[float], float | None] | None
    data_metrics: Callable[[TrainState], dict[str, float]]
    tasks: Sequence[Periodic] = ()


@dataclass(frozen=True)
class LoopResult:
    """How the loop ended: at the last step or stopped before; the state is saved."""

    state: TrainState
    finished: bool


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make every random draw of a step (dropout) a function of (seed, step, rank), so that no generator is saved."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def train(parts: LoopParts, total_steps: int, state: TrainState | None) -> LoopResult:
    """Run from `state` (None: from the start) to `total_steps`, or until all ranks agree to stop.

    Raises:
        TrainingError: On all ranks: a validation loss is not finite, or all rollbacks are used.
        StorageError: On all ranks: the state cannot be saved, and the run is about to end or must stop.
    """
    world = parts.world
    read = partial(
        parts.stream.micro_batches, rank=world.rank, world_size=world.size, micro_batch_size=parts.micro_batch_size
    )
    with closing(Prefetcher(read, pin=parts.engine.device.type == "cuda")) as batches:
        return _Loop(parts, total_steps, batches, state or TrainState(validation_due=True)).run()


class _Loop:
    """The loop of one launch."""

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
        """Run the tasks that are still due; False if the run was asked to stop before their end."""
        with self._parts.watch.phase("start", self._state.step):
            stop = self._stop_requested()
        if stop:  # while the engine was built; the state is saved already
            return False
        if not self._state.validation_due or self._run_tasks(validate=True):
            return True
        if self._state.step:
            self._save(leaving=True)
        return False

    def _advance(self) -> Requests:
        """Do and log one optimizer step; returns the requests that the ranks agreed on at its end."""
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
        """Run the tasks of a step, save, delete the files of handled requests; returns whether to continue."""
        complete = self._run_tasks(validate=requests.evaluate)
        last, leaving = self._state.step == self._total_steps, requests.stop or not complete
        self._save_due |= self._is_due(self._parts.recipe.checkpoint.interval_steps)
        # A rollback to a checkpoint from between faults would change little.
        if last or leaving or requests.save or (self._save_due and not self._state.faults.in_a_row):
            self._save(leaving=last or leaving)
        self._acknowledge(replace(requests, stop=leaving))
        return complete if last else not leaving

    def _is_due(self, every: int) -> bool:
        """Whether this step is the last or every n-th."""
        return self._state.step == self._total_steps or self._state.step % every == 0

    def _run_tasks(self, *, validate: bool) -> bool:
        """Run the tasks that are due at this step, the validation also on request; False if stopped early."""
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
        """This rank's; a failed async save forces a save, so that all ranks raise its error together."""
        requests = self._parts.controls.requests()
        return replace(requests, save=True) if self._parts.saver.wants_save else requests

    def _report_saved(self) -> None:
        """Report a newly published checkpoint; an async one is published some steps later."""
        published = self._parts.saver.published_step
        if published is not None and published != self._reported_step:
            self._reported_step = published
            self._parts.controls.saved(self._parts.saver.last_save_s)
            self._parts.recorder.saved(published)

    def _take(self) -> list[torch.Tensor]:
        """The micro-batches of this step; starts reading those of the next."""
        state = self._state
        following = batch_of(state.step + 1, state.skipped_batches) if state.step + 1 < self._total_steps else None
        with self._parts.watch.phase("data", state.step + 1):
            return self._batches.take(state.batch_number, following)

    def _acknowledge(self, requests: Requests) -> None:
        """Delete the files of handled requests; watched, since their disk may hang."""
        with self._parts.watch.phase("log", self._state.step):
            self._parts.controls.acknowledge(requests)

    def _stop_requested(self) -> bool:
        """Whether any rank was asked to stop; all ranks call it together."""
        return agree(self._parts.controls.requests().stop, self._parts.engine.device)

    def _save(self, *, leaving: bool) -> None:
        """Save; when leaving, wait until the state is on the disk."""
        parts, saver = self._parts, self._parts.saver
        with self._clock.stopped(), parts.watch.phase("save", self._state.step):
            saved, self._save_due = saver.save(parts.engine, self._state), False
            if leaving:
                saved = saver.wait() and saved
            self._report_saved()
        if leaving and not saved:
            raise StorageError(
                f"step {self._state.step} could not be saved before leaving: {saver.refusal}",
                action="free some space, then rerun the same command to resume from the checkpoint before",
            )

    def _roll_back(self) -> None:
        """Restore the newest verified checkpoint, and skip the batches of the skipped updates."""
        parts, state, policy = self._parts, self._state, self._parts.recipe.faults
        first, end = faulty_batches(state)
        skipped = f"{state.faults.in_a_row} updates in a row were skipped (batches {first} to {end - 1})"
        reason = f"step {state.step}: {skipped}"
        if state.faults.rollbacks >= policy.max_rollbacks:
            raise TrainingError(
                f"{reason}, after {state.faults.rollbacks} rollbacks",
                allowed=f"faults.max_rollbacks: {policy.max_rollbacks}",
                action="look at these batches and at metrics.jsonl; lower optimizer.lr or lengthen "
                "schedule.warmup_steps in a new run; rerun the same command to retry from the newest checkpoint",
            )
        with self._clock.stopped(), parts.watch.phase("save", state.step):
            parts.saver.wait()
            restored = parts.restore()
        if restored is None:
            raise TrainingError(
                f"{reason}, and there is no checkpoint yet to roll back to",
                allowed="a checkpoint before the first fault (checkpoint.interval_steps)",
                action="lower optimizer.lr, lengthen schedule.warmup_steps, or look at the data",
            )
        self._state = rolled_back(state, restored)
        self._guard, self._save_due = FaultGuard(policy, self._state.faults), False
        with parts.watch.phase("log", restored.step):
            parts.recorder.rewind(restored.step)
        count = f"rollback {self._state.faults.rollbacks} of {policy.max_rollbacks}"
        logger.warning("%s; the run returns to step %d and skips these batches (%s)", reason, restored.step, count)

    def _log(self, result: StepResult, lr: float) -> None:
        parts, state, clock = self._parts, self._state, self._clock
        values = {
            "train/loss": result.loss,
            "train/lr": lr,
            "train/grad_norm": result.grad_norm,
            "train/skipped_steps": state.skipped_steps,
            "train/rollbacks": state.faults.rollbacks,
            **clock.metrics(),
            "mem/peak_gib": peak_memory_gib(),
            **parts.data_metrics(state),
        }
        if parts.utilization is not None and (share := parts.utilization(clock.tokens_per_s)) is not None:
            values["perf/mfu"] = share
        with parts.watch.phase("log", state.step):
            parts.recorder.log(state.step, state.tokens, values)
        clock.restart()
