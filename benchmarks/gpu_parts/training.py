"""A training case in this process: the program's own engine and loop on random tokens, timed in blocks of steps.

A block ends when the device has caught up; the loop waits for it anyhow, since it reads the loss of every step.
"""

import os
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from benchmarks.gpu_parts.case import Case, Trained
from benchmarks.gpu_parts.planning import predicted_gib, predicted_tokens_per_s
from benchmarks.program import kernels_of, loop_parts
from benchmarks.record import REPOSITORY
from benchmarks.side_by_side import TOTAL_STEPS, write_tokens
from benchmarks.subjects.project import recipe_of
from benchmarks.subjects.turns import Order
from benchmarks.subjects.windows import build_model
from inheritune_ds.checkpoints.train_state import SavedLayout, TrainState
from inheritune_ds.config import deepspeed_checks
from inheritune_ds.config.deepspeed import MICRO_BATCH, Machine, Resolved, resolve
from inheritune_ds.config.model import Shape
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.distributed.environment import prepare_environment
from inheritune_ds.distributed.process_group import start_process_group
from inheritune_ds.distributed.world import World, detect, export
from inheritune_ds.plan.gpus import identify, mfu
from inheritune_ds.plan.machine import host_memory_gib
from inheritune_ds.plan.micro_batch import fit
from inheritune_ds.plan.model_size import GIB, flops_per_token
from inheritune_ds.tracking.recorder import Recorder
from inheritune_ds.training.engine import Engine
from inheritune_ds.training.loop import train

SYNC_STEPS = 2
"""Steps of the pass that counts host synchronizations, after the timed ones."""
_TOY_MEMORY_GIB = 2.0
_SYNC_WARNING = "synchronizing CUDA operation"
_CALLER = 3
"""DeepSpeed synchronizes by a method of its accelerator: the place that matters calls that."""


class _DoneError(BaseException):
    """The last step is made; no handler of errors takes it for one."""


def run_case(case: Case, folder: Path) -> Trained:
    """Train a case; its tokens are written to `folder`.

    Raises:
        TrainingError: If the rate is above the GPU's peak: then the clock is wrong.
        RecipeError: If the planner finds no micro-batch that fits.
    """
    start_s = time.monotonic()
    with _environment_kept():
        world = detect(os.environ)
        export(world, os.environ)
        prepare_environment(os.environ, kind=case.device)
        recipe, resolved = _documents(case, folder)
        shape = Shape.model_validate(case.shape)
        found = Trained(
            name=case.name,
            micro_batch=resolved.micro_batch_size,
            accumulation=resolved.gradient_accumulation_steps,
            parameters=0,
            step_tokens=recipe.training.global_batch_tokens,
            predicted_gib=predicted_gib(shape, resolved),
            predicted_tokens_per_s=_predicted_rate(case, shape, resolved),
        )
        if case.cap_gib is not None and case.device == "cuda":
            total = torch.cuda.get_device_properties(0).total_memory / GIB
            torch.cuda.set_per_process_memory_fraction(min(1.0, case.cap_gib / total))
        try:
            return _train(case, folder, recipe, resolved, world, found, start_s)
        except torch.OutOfMemoryError as error:
            return replace(found, out_of_memory=str(error).partition("\n")[0])


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Restore the environment: exported ranks must not reach the next program started from here."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _order(case: Case, folder: Path) -> Order:
    """The case as the subjects of a side-by-side measurement take it; the micro-batch is settled later."""
    return Order(
        subject="project_shipped",
        shape=case.shape,
        micro_batch=1,
        accumulation=case.step_windows,
        device=case.device,
        keep_freed_memory=False,
        tokens=str(folder / f"{case.name}.tokens"),
        folder=str(folder),
        warmup_steps=case.warmup_steps,
        total_steps=TOTAL_STEPS,
        started_s=0.0,
    )


def _documents(case: Case, folder: Path) -> tuple[Recipe, Resolved]:
    recipe = recipe_of(_order(case, folder))
    every_step = recipe.logging.model_copy(update={"interval_steps": 1})
    recipe = recipe.model_copy(update={"logging": every_step})
    document = deepspeed_checks.read(REPOSITORY / "ds_configs" / case.ds_config)
    document |= {"bf16": {"enabled": True}, **case.document}
    if case.micro_batch is not None:
        document[MICRO_BATCH] = case.micro_batch
    memory_gib = case.memory_gib or (_TOY_MEMORY_GIB if case.device == "cpu" else host_memory_gib())
    shape = Shape.model_validate(case.shape)
    machine = Machine(case.device, memory_gib, bf16=True)
    on: dict[str, Any] = {"origin": case.ds_config, "world_size": 1, "machine": machine}
    return recipe, fit(resolve(document, recipe, shape=(shape, shape.num_hidden_layers), **on), recipe, **on)


def _predicted_rate(case: Case, shape: Shape, resolved: Resolved) -> float | None:
    name = torch.cuda.get_device_name() if case.device == "cuda" else ""
    known = identify(name)
    return None if known is None else predicted_tokens_per_s(shape, resolved, known)


def _train(  # noqa: PLR0913, PLR0917 - parts of the resolved case
    case: Case, folder: Path, recipe: Recipe, resolved: Resolved, world: World, found: Trained, start_s: float
) -> Trained:
    order = _order(case, folder)
    write_tokens(Path(order.tokens), case.shape)
    start_process_group(world)
    model = build_model(order)
    parameters = model.num_parameters()
    run_tokens = TOTAL_STEPS * recipe.training.global_batch_tokens
    kernels, notes = kernels_of(resolved, model, case.device, run_tokens)
    engine = Engine(model, resolved.config, world, kernels)
    del model
    meter = _Meter(case, resolved.gradient_accumulation_steps, start_s)
    try:
        parts = loop_parts(
            recipe,
            engine,
            meter,
            tokens=Path(order.tokens),
            folder=folder,
            layout=SavedLayout(world.size, resolved.zero_stage, resolved.precision),
            micro_batch=resolved.micro_batch_size,
        )
        train(parts, TOTAL_STEPS, TrainState())
    except _DoneError:
        engine.close()  # after anything else, memory running out above all, it might raise again and hide that
    finally:
        meter.close()
    return meter.result(replace(found, parameters=parameters, notes=(*notes, *engine.notes)))


def _warning(synchronize: Callable[..., None]) -> Callable[..., None]:
    """Torch's debug mode does not warn of an explicit synchronization."""

    def warn_and_synchronize(*device: Any) -> None:
        warnings.warn(f"called {_SYNC_WARNING} explicitly", stacklevel=_CALLER)
        synchronize(*device)

    return warn_and_synchronize


class _Meter(Recorder):
    """The loop's recorder: takes the time at the ends of blocks, and ends the loop."""

    def __init__(self, case: Case, accumulation: int, start_s: float) -> None:
        self._case, self._accumulation, self._start_s = case, accumulation, start_s
        self._loop_s = time.monotonic()
        self._first_s = 0.0
        self._cuda = case.device == "cuda"
        self._last = case.warmup_steps + case.blocks * case.block_steps
        self._marks: list[float] = []
        self._logged: list[Mapping[str, float]] = []
        self._loss = 0.0
        self._graphs = [counters["stats"]["unique_graphs"]] * 3
        self._memory: tuple[float, float] | None = None
        self._syncs: list[warnings.WarningMessage] = []
        self._opened = ExitStack()

    def update(self, step: int, loss: float, tokens_per_s: float) -> None:  # noqa: ARG002 - the loop's own clock
        """Take the measurements at the end of a step."""
        self._loss = loss
        self._first_s = self._first_s or time.monotonic()
        timed = step - self._case.warmup_steps
        if 0 <= timed <= self._last - self._case.warmup_steps and timed % self._case.block_steps == 0:
            self._mark()
        if step == self._case.warmup_steps:
            self._graphs[1] = counters["stats"]["unique_graphs"]
            if self._cuda:
                torch.cuda.reset_peak_memory_stats()
        if step == self._last:
            self._graphs[2] = counters["stats"]["unique_graphs"]
            if self._cuda:
                self._memory = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
                self._count_syncs()
        if step == self._last + (SYNC_STEPS if self._cuda else 0):
            raise _DoneError

    def log(self, step: int, tokens: int, values: Mapping[str, float]) -> None:  # noqa: ARG002 - the loop's protocol
        """Keep the values logged in the timed steps."""
        if self._case.warmup_steps < step <= self._last:
            self._logged.append(values)

    def close(self) -> None:
        """Put torch's and Python's warnings back."""
        self._opened.close()

    def _mark(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        self._marks.append(time.perf_counter())

    def _count_syncs(self) -> None:
        self._syncs = self._opened.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        self._opened.callback(torch.cuda.set_sync_debug_mode, "default")
        self._opened.callback(setattr, torch.cuda, "synchronize", torch.cuda.synchronize)
        torch.cuda.synchronize = _warning(torch.cuda.synchronize)

    def result(self, found: Trained) -> Trained:
        """The case with everything that was measured."""
        case = self._case
        rates = [
            found.step_tokens * case.block_steps / (end - start)
            for start, end in zip(self._marks, self._marks[1:], strict=False)
        ]
        median = statistics.median(rates)
        places = Counter(
            f"{'/'.join(Path(caught.filename).parts[-3:])}:{caught.lineno}"
            for caught in self._syncs
            if _SYNC_WARNING in str(caught.message)
        )
        often = SYNC_STEPS * found.accumulation
        can_tell = self._cuda and found.accumulation > 1
        return replace(
            found,
            steps=case.blocks * case.block_steps,
            tokens_per_s={"median": median, "min": min(rates), "max": max(rates)},
            first_step_s=self._first_s - self._loop_s,
            start_s=self._first_s - self._start_s,
            mfu=self._mfu(median),
            peak_gib=self._memory[0] if self._memory else None,
            reserved_gib=self._memory[1] if self._memory else None,
            outside_ratio=self._median("perf/outside_ratio"),
            data_wait_ratio=self._median("perf/data_wait_ratio"),
            graphs=self._graphs[1] - self._graphs[0],
            left_eager=counters["frames"]["total"] - counters["frames"]["ok"],
            breaks=sum(counters["graph_break"].values()),
            recompiles=self._graphs[2] - self._graphs[1],
            syncs={place: count / SYNC_STEPS for place, count in places.items()} if self._cuda else None,
            # A step has some of its own: only those at least as frequent as micro-steps are theirs.
            syncs_per_micro_step=sum(count // often for count in places.values()) if can_tell else None,
            loss=self._loss,
        )

    def _mfu(self, tokens_per_s: float) -> float | None:
        known = identify(torch.cuda.get_device_name()) if self._cuda else None
        shape = Shape.model_validate(self._case.shape)
        each = flops_per_token(shape, shape.num_hidden_layers, shape.max_position_embeddings)
        return None if known is None else mfu(tokens_per_s, each, known, 1)

    def _median(self, name: str) -> float:
        return statistics.median(values[name] for values in self._logged)
