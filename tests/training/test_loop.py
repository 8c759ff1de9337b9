import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from inheritune_ds.checkpoints.train_state import Requests, TrainState
from inheritune_ds.config.loading import load_recipe
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.config.reliability import Reliability
from inheritune_ds.data.stream.batches import BatchStream
from inheritune_ds.data.stream.validation_windows import HeldOut
from inheritune_ds.data.stream.windows import Windows
from inheritune_ds.distributed.signals import StopSignal
from inheritune_ds.distributed.watchdog import Watchdog
from inheritune_ds.distributed.world import World
from inheritune_ds.errors import StorageError, TrainingError
from inheritune_ds.tracking.metrics import make_row
from inheritune_ds.tracking.recorder import Recorder
from inheritune_ds.training.engine import StepResult
from inheritune_ds.training.loop import LoopParts, Periodic, seed_step, train
from inheritune_ds.training.requests import Controls
from inheritune_ds.training.validation import Validator
from tests.conftest import Logged

SEQ_LEN, BATCH = 4, 2


class Model:
    def __init__(self, *validation: float) -> None:
        self.validation = iter([*validation, *[2.0] * 100])
        self.losses: dict[int, float] = {}
        """Losses other than 3, by the number of the computed step, from 1."""
        self.read: list[int] = []
        """First token of each step's batch."""

    device = torch.device("cpu")

    def train_step(
        self,
        micro_batches: list[torch.Tensor],
        *,
        lr: float,
        requests: Requests,
        judge: Callable[[float, float], str | None],
    ) -> StepResult:
        assert lr > 0
        assert len(micro_batches) == 1
        self.read.append(int(micro_batches[0][0, 0]))
        loss = self.losses.get(len(self.read), 3.0)
        fault = judge(loss, 1.0)
        return StepResult(loss, 1.0, applied=fault is None, fault=fault, requests=requests, passes_s=0.0)

    def window_losses(self, batches: list[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.float32]]:
        loss = next(self.validation)
        return [np.full((len(batch), SEQ_LEN), loss, dtype=np.float32) for batch in batches]


class Saved:
    last_save_s = 0.1
    published_step: int | None = None
    wants_save = False
    refuses = False
    refusal = "the disk is full"

    def __init__(self) -> None:
        self.states: list[TrainState] = []

    def save(self, _engine: object, state: TrainState) -> bool:
        if not self.refuses:
            self.states.append(state)
            self.published_step = state.step
        return not self.refuses

    def wait(self) -> bool:
        return True

    def restore(self) -> TrainState | None:
        return self.states[-1] if self.states else None


class Recorded(Recorder):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.saved_steps: list[int] = []

    def log(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        self.rows.append(make_row(step, tokens, values))

    def saved(self, step: int) -> None:
        self.saved_steps.append(step)

    def rewind(self, step: int) -> None:
        self.rows = [row for row in self.rows if row["step"] <= step]


@pytest.fixture
def recipe() -> Recipe:
    sizes = [f"training.seq_len={SEQ_LEN}", f"training.global_batch_tokens={SEQ_LEN * BATCH}"]
    return load_recipe(
        "quickstart", [*sizes, "validation.interval_steps=2", "checkpoint.interval_steps=3", "logging.interval_steps=1"]
    )


class Run:
    """The parts of a run on stubs; `losses` are those of its first validations."""

    def __init__(self, recipe: Recipe, folder: Path, *losses: float, rank: int = 0) -> None:
        np.arange(10 * SEQ_LEN + 1, dtype="<u2").tofile(folder / "tokens.bin")
        windows = Windows.of_file(folder / "tokens.bin", "uint16", SEQ_LEN, 10 * SEQ_LEN + 1)
        (folder / "eval").mkdir()
        self.model, self.saved, self.recorded = Model(*losses), Saved(), Recorded()
        self.world = World(rank, 1 + rank, rank, 1 + rank, "env")
        given: dict[str, Any] = {"engine": self.model, "saver": self.saved}
        self.parts = LoopParts(
            recipe=recipe,
            stream=BatchStream({"tokens": windows}, seed=7, batch_windows=BATCH),
            validator=Validator(HeldOut({"tokens": windows}, limit=100, eos_id=0), batch_size=4, rank=0, size=1),
            recorder=self.recorded,
            restore=self.saved.restore,
            controls=Controls(folder, StopSignal(), self.world),
            watch=Watchdog(Reliability(watchdog=False), self.world, folder, on_hang=print),
            world=self.world,
            eval_dir=folder / "eval",
            micro_batch_size=BATCH // (1 + rank),
            utilization=None,
            data_metrics=lambda _state: {},
            **given,
        )

    def train(self, steps: int, state: TrainState | None = None, **parts: Any) -> Any:
        return train(replace(self.parts, **parts), steps, state)

    def steps_with(self, metric: str) -> list[float]:
        return [row["step"] for row in self.recorded.rows if metric in row]


@pytest.fixture
def run(recipe: Recipe, tmp_path: Path) -> Run:
    return Run(recipe, tmp_path)


@pytest.mark.parametrize(
    ("losses", "step", "rank"), [((math.nan,), 0, 0), ((2.0, math.inf), 2, 0), ((math.nan,), 0, 1)]
)
def test_a_validation_loss_that_is_not_finite_ends_the_run_on_all_ranks(
    losses: tuple[float, ...], step: int, rank: int, recipe: Recipe, tmp_path: Path
) -> None:
    message = rf"^step {step}: the validation loss is (nan|inf)\n.*finite.*\n  do: lower"
    with pytest.raises(TrainingError, match=message):
        Run(recipe, tmp_path, *losses, rank=rank).train(6)
    assert not (tmp_path / f"eval/validation-step-{step:08d}.json").exists()


def test_train_validates_logs_and_saves_at_its_steps(recipe: Recipe, tmp_path: Path) -> None:
    run = Run(recipe, tmp_path, 5.0)
    result = run.train(5)
    assert (result.finished, result.state.step, result.state.tokens) == (True, 5, 5 * SEQ_LEN * BATCH)
    validations = [(row["step"], row["val/loss"]) for row in run.recorded.rows if "val/loss" in row]
    assert validations == [(0, 5.0), (2, 2.0), (4, 2.0), (5, 2.0)]
    assert run.recorded.saved_steps == [3, 5]
    assert json.loads((tmp_path / "eval/validation-step-00000000.json").read_text())["loss"] == 5.0


def test_faults_in_a_row_roll_the_run_back_and_skip_their_batches(
    recipe: Recipe, run: Run, tmp_path: Path, logged: Logged
) -> None:
    (tmp_path / "straight").mkdir()
    straight = Run(recipe, tmp_path / "straight")
    straight.train(12)
    read = straight.model.read
    logged()
    run.model.losses = dict.fromkeys((5, 6, 7), math.nan)  # steps 5 to 7; the checkpoint before is that of step 3
    result = run.train(9)
    assert run.model.read == [*read[:7], read[3], *read[7:12]]
    assert (result.state.step, result.state.skipped_steps, result.state.skipped_batches) == (9, 0, ((4, 7),))
    assert result.state.faults.rollbacks == 1
    lines = logged()
    (line,) = (line for line in lines if "rollback" in line)
    skipped = "3 updates in a row were skipped (batches 4 to 6)"
    assert f"WARNING: step 7: {skipped}; the run returns to step 3 and skips these batches (rollback 1 of 2)" in line
    assert [line[:6] for line in lines if "the loss is nan" in line] == ["step 5", "step 6", "step 7"]
    assert run.steps_with("train/lr") == list(range(1, 10)), "undone steps are not in the metrics"


def test_a_due_validation_is_not_repeated_after_a_rollback(run: Run) -> None:
    run.model.losses = dict.fromkeys((1, 2, 3), math.nan)
    stopped = TrainState(step=4, tokens=4 * SEQ_LEN * BATCH, validation_due=True)
    run.saved.states.append(stopped)
    assert run.train(9, stopped).state.faults.rollbacks == 1
    assert not any(state.validation_due for state in run.saved.states[1:])
    assert run.steps_with("val/loss") == [4, 6, 8, 9]


def test_a_save_counts_for_the_time_limit_once_it_is_published(run: Run, tmp_path: Path) -> None:
    class InBackground(Saved):
        last_save_s = 0.0

        def save(self, _engine: object, state: TrainState) -> bool:
            self.states.append(state)
            return True

    class Measured(Controls):
        def saved(self, seconds: float) -> None:
            seen.append(seconds)

        def stepped(self, seconds: float) -> None:
            super().stepped(seconds)
            if len(run.model.read) == 4:  # the save of step 3 has ended by now
                saved.published_step, saved.last_save_s = 3, 7.0

    seen: list[float] = []
    saved = InBackground()
    run.train(5, saver=saved, controls=Measured(tmp_path, StopSignal(), run.world))
    assert seen == [7.0], "not the 0.0 of a save in progress"


def test_single_faults_are_skipped_and_counted(run: Run) -> None:
    run.model.losses = {2: math.inf, 5: math.nan}
    result = run.train(6)
    assert (result.finished, result.state.skipped_steps, result.state.skipped_batches) == (True, 2, ())
    rows = {row["step"]: row for row in run.recorded.rows if "train/lr" in row}
    assert [rows[step]["train/skipped_steps"] for step in range(1, 7)] == [0, 1, 1, 1, 2, 2]
    assert [step for step in rows if "train/loss" not in rows[step]] == [2, 5]


@pytest.mark.parametrize(
    ("first", "words"),
    [(1, "there is no checkpoint yet to roll back to"), (4, r"step \d+: 3 updates .* after 2 rollbacks")],
)
def test_a_run_ends_when_rollbacks_do_not_help(first: int, words: str, run: Run) -> None:
    run.model.losses = dict.fromkeys(range(first, 100), math.nan)
    with pytest.raises(TrainingError, match=words):
        run.train(50)


def test_a_run_that_cannot_save_before_its_end_raises(run: Run) -> None:
    run.saved.refuses = True
    with pytest.raises(StorageError, match="step 5 could not be saved before leaving: the disk is full"):
        run.train(5)


def test_ranks_agree_only_inside_watched_phases(run: Run, tmp_path: Path) -> None:
    inside: list[str] = []
    asked: list[str] = []

    @contextmanager
    def phase(name: str, _step: int) -> Iterator[None]:
        inside.append(name)
        yield
        inside.pop()

    watch: Any = run.parts.watch
    watch.phase = phase

    class Asked(Controls):
        def requests(self) -> Requests:
            asked.append(" ".join(inside))
            return super().requests()

    run.train(3, controls=Asked(tmp_path, StopSignal(), run.world))
    # A validation of a few batches asks once, before its first.
    assert asked == ["start", "validation", "first_step", "step", "validation", "step", "validation"]


def test_files_in_the_run_folder_ask_for_a_save_a_validation_and_a_stop(run: Run, tmp_path: Path) -> None:
    for name in ("SAVE", "EVAL", "STOP"):
        (tmp_path / name).touch()
    result = run.train(20, TrainState(step=4))
    assert (result.finished, result.state.step, run.recorded.saved_steps) == (False, 4, []), "nothing to save"
    assert not (tmp_path / "STOP").exists()
    run.train(6, TrainState(step=4), controls=Controls(tmp_path, StopSignal(), run.world))
    assert run.steps_with("val/loss") == run.recorded.saved_steps == [5, 6]
    assert not [name for name in ("SAVE", "EVAL", "STOP") if (tmp_path / name).exists()]


def test_a_validation_that_a_stop_interrupts_is_repeated_by_the_next_launch(run: Run, tmp_path: Path) -> None:
    asked = StopSignal()
    validator: Any = run.parts.validator
    validate = validator.validate_unless

    def stopped(stop: Callable[[], bool], scorer: Any) -> Any:
        if run.recorded.rows and run.recorded.rows[-1]["step"] == 2:
            asked.requested = "SIGTERM"
        return validate(stop, scorer)

    validator.validate_unless = stopped
    result = run.train(6, controls=Controls(tmp_path, asked, run.world))
    assert (result.finished, result.state.step, result.state.validation_due) == (False, 2, True)
    validator.validate_unless = validate
    assert run.train(6, result.state, controls=Controls(tmp_path, StopSignal(), run.world)).finished
    assert run.steps_with("val/loss") == [0, 2, 4, 6]


def test_a_disk_that_refuses_the_losses_of_windows_ends_the_run_at_the_last_step_only(
    run: Run, tmp_path: Path, logged: Logged
) -> None:
    with pytest.raises(StorageError, match=r"validation-step-00000005\.json\S* cannot be written"):
        run.train(5, TrainState(step=3), eval_dir=tmp_path / "missing")
    assert [line[:7] for line in logged() if "has the mean" in line] == ["WARNING"]
    assert run.steps_with("val/loss") == [4]


def test_seed_step_makes_randomness_a_function_of_seed_step_and_rank() -> None:
    def draw(seed: int, step: int, rank: int) -> float:
        torch.rand(step + rank)  # earlier draws do not matter
        seed_step(seed, step, rank)
        return float(torch.rand(()))

    assert draw(1, 2, 3) == draw(1, 2, 3)
    combinations = [(seed, step, rank) for seed in (1, 12) for step in (0, 1, 23, 3) for rank in (0, 1, 3)]
    assert len({draw(*combination) for combination in combinations}) == len(combinations)
    seed_step(1337, 0, 0)
    assert torch.initial_seed() == 5_906_761_872_107_461_528  # the seed of existing runs


def test_tasks_run_at_their_steps_after_the_validation_and_before_the_checkpoint(run: Run) -> None:
    seen: list[tuple[int, bool, list[int]]] = []

    def look(state: TrainState, stop: Callable[[], bool]) -> bool:
        assert not stop()
        validated = state.step in run.steps_with("val/loss")
        seen.append((state.step, validated, [done.step for done in run.saved.states]))
        return True

    assert run.train(7, tasks=(Periodic(3, look),)).finished
    assert seen == [(0, True, []), (3, False, []), (6, True, [3]), (7, True, [3, 6])]


def test_a_task_that_a_stop_interrupts_is_repeated_by_the_next_launch(run: Run) -> None:
    answers, after = iter([True, False, True, True]), []

    def first(_state: TrainState, _stop: Callable[[], bool]) -> bool:
        return next(answers)

    def second(state: TrainState, _stop: Callable[[], bool]) -> bool:
        after.append(state.step)
        return True

    tasks = (Periodic(3, first), Periodic(1, second))
    result = run.train(6, TrainState(step=1), tasks=tasks)
    assert (result.finished, result.state.step, result.state.validation_due, after) == (False, 6, True, [2, 3, 4, 5])
    assert run.saved.states[-1] == result.state
    assert run.train(6, result.state, tasks=tasks).finished
    assert after == [2, 3, 4, 5, 6]
