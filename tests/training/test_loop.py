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

    def window_losses(self, batches: list[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.float64]]:
        loss = next(self.validation)
        return [np.full(len(batch), loss) for batch in batches]


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


def parts(recipe: Recipe, model: Model, folder: Path, recorded: Recorded, *, rank: int = 0) -> LoopParts:
    np.arange(10 * SEQ_LEN + 1, dtype="<u2").tofile(folder / "tokens.bin")
    windows = Windows.of_file(folder / "tokens.bin", "uint16", SEQ_LEN, 10 * SEQ_LEN + 1)
    (folder / "eval").mkdir()
    saved, world = Saved(), World(rank, 1 + rank, rank, 1 + rank, "env")
    given: dict[str, Any] = {"engine": model, "saver": saved}
    return LoopParts(
        recipe=recipe,
        stream=BatchStream({"tokens": windows}, seed=7, batch_windows=BATCH),
        validator=Validator(HeldOut({"tokens": windows}), max_tokens=1000, batch_size=4, rank=0, size=1),
        recorder=recorded,
        restore=saved.restore,
        controls=Controls(folder, StopSignal(), world),
        watch=Watchdog(Reliability(watchdog=False), world, folder, on_hang=print),
        world=world,
        eval_dir=folder / "eval",
        micro_batch_size=BATCH // (1 + rank),
        utilization=None,
        data_metrics=lambda _state: {},
        **given,
    )


@pytest.mark.parametrize(
    ("losses", "step", "rank"), [((math.nan,), 0, 0), ((2.0, math.inf), 2, 0), ((math.nan,), 0, 1)]
)
def test_a_validation_loss_that_is_not_finite_ends_the_run_on_all_ranks(
    losses: tuple[float, ...], step: int, rank: int, recipe: Recipe, tmp_path: Path
) -> None:
    message = rf"^step {step}: the validation loss is (nan|inf)\n.*finite.*\n  do: lower"
    with pytest.raises(TrainingError, match=message):
        train(parts(recipe, Model(*losses), tmp_path, Recorded(), rank=rank), 6, None)
    assert not (tmp_path / f"eval/validation-step-{step:08d}.json").exists()


def test_train_validates_logs_and_saves_at_its_steps(recipe: Recipe, tmp_path: Path) -> None:
    recorded = Recorded()
    result = train(parts(recipe, Model(5.0), tmp_path, recorded), 5, None)
    assert (result.finished, result.state.step, result.state.tokens) == (True, 5, 5 * SEQ_LEN * BATCH)
    validations = [(row["step"], row["val/loss"]) for row in recorded.rows if "val/loss" in row]
    assert validations == [(0, 5.0), (2, 2.0), (4, 2.0), (5, 2.0)]
    assert recorded.saved_steps == [3, 5]
    assert json.loads((tmp_path / "eval/validation-step-00000000.json").read_text())["loss"] == 5.0


def test_faults_in_a_row_roll_the_run_back_and_skip_their_batches(
    recipe: Recipe, tmp_path: Path, logged: Logged
) -> None:
    straight = Model()
    (tmp_path / "straight").mkdir()
    train(parts(recipe, straight, tmp_path / "straight", Recorded()), 12, None)
    logged()
    recorded, model = Recorded(), Model()
    model.losses = dict.fromkeys((5, 6, 7), math.nan)  # steps 5 to 7; the checkpoint before them is that of step 3
    result = train(parts(recipe, model, tmp_path, recorded), 9, None)
    assert model.read == [*straight.read[:7], straight.read[3], *straight.read[7:12]]
    assert (result.state.step, result.state.skipped_steps, result.state.skipped_batches) == (9, 0, ((4, 7),))
    assert result.state.faults.rollbacks == 1
    lines = logged()
    (line,) = (line for line in lines if "rollback" in line)
    skipped = "3 updates in a row were skipped (batches 4 to 6)"
    assert f"WARNING: step 7: {skipped}; the run returns to step 3 and skips these batches (rollback 1 of 2)" in line
    assert [line[:6] for line in lines if "the loss is nan" in line] == ["step 5", "step 6", "step 7"]
    steps = [row["step"] for row in recorded.rows if "train/lr" in row]
    assert steps == list(range(1, 10)), "undone steps are not in the metrics"


def test_a_due_validation_is_not_repeated_after_a_rollback(recipe: Recipe, tmp_path: Path) -> None:
    recorded, model = Recorded(), Model()
    model.losses = dict.fromkeys((1, 2, 3), math.nan)
    work = parts(recipe, model, tmp_path, recorded)
    given: Any = work.saver
    stopped = TrainState(step=4, tokens=4 * SEQ_LEN * BATCH, validation_due=True)
    given.states.append(stopped)
    result = train(work, 9, stopped)
    assert result.state.faults.rollbacks == 1
    assert not any(state.validation_due for state in given.states[1:])
    assert [row["step"] for row in recorded.rows if "val/loss" in row] == [4, 6, 8, 9]


def test_a_save_counts_for_the_time_limit_once_it_is_published(recipe: Recipe, tmp_path: Path) -> None:
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
            if len(model.read) == 4:  # the save of step 3 has ended by now
                saved.published_step, saved.last_save_s = 3, 7.0

    seen: list[float] = []
    saved: Any = InBackground()
    model = Model()
    work = replace(parts(recipe, model, tmp_path, Recorded()), saver=saved)
    work = replace(work, controls=Measured(tmp_path, StopSignal(), work.world))
    train(work, 5, None)
    assert seen == [7.0], "not the 0.0 of a save in progress"


def test_single_faults_are_skipped_and_counted(recipe: Recipe, tmp_path: Path) -> None:
    recorded, model = Recorded(), Model()
    model.losses = {2: math.inf, 5: math.nan}
    result = train(parts(recipe, model, tmp_path, recorded), 6, None)
    assert (result.finished, result.state.skipped_steps, result.state.skipped_batches) == (True, 2, ())
    rows = {row["step"]: row for row in recorded.rows if "train/lr" in row}
    assert [rows[step]["train/skipped_steps"] for step in range(1, 7)] == [0, 1, 1, 1, 2, 2]
    assert [step for step in rows if "train/loss" not in rows[step]] == [2, 5]


@pytest.mark.parametrize(
    ("first", "words"),
    [(1, "there is no checkpoint yet to roll back to"), (4, r"step \d+: 3 updates .* after 2 rollbacks")],
)
def test_a_run_ends_when_rollbacks_do_not_help(first: int, words: str, recipe: Recipe, tmp_path: Path) -> None:
    model = Model()
    model.losses = dict.fromkeys(range(first, 100), math.nan)
    with pytest.raises(TrainingError, match=words):
        train(parts(recipe, model, tmp_path, Recorded()), 50, None)


def test_a_run_that_cannot_save_before_its_end_raises(recipe: Recipe, tmp_path: Path) -> None:
    work = parts(recipe, Model(), tmp_path, Recorded())
    vars(work.saver)["refuses"] = True
    with pytest.raises(StorageError, match="step 5 could not be saved before leaving: the disk is full"):
        train(work, 5, None)


def test_ranks_agree_only_inside_watched_phases(recipe: Recipe, tmp_path: Path) -> None:
    inside: list[str] = []
    asked: list[str] = []

    @contextmanager
    def phase(name: str, _step: int) -> Iterator[None]:
        inside.append(name)
        yield
        inside.pop()

    work = parts(recipe, Model(), tmp_path, Recorded())
    watch: Any = work.watch
    watch.phase = phase

    class Asked(Controls):
        def requests(self) -> Requests:
            asked.append(" ".join(inside))
            return super().requests()

    train(replace(work, controls=Asked(tmp_path, StopSignal(), work.world)), 3, None)
    # A validation of a few batches asks once, before its first.
    assert asked == ["start", "validation", "first_step", "step", "validation", "step", "validation"]


def test_files_in_the_run_folder_ask_for_a_save_a_validation_and_a_stop(recipe: Recipe, tmp_path: Path) -> None:
    recorded, model = Recorded(), Model()
    work = parts(recipe, model, tmp_path, recorded)
    for name in ("SAVE", "EVAL", "STOP"):
        (tmp_path / name).touch()
    result = train(work, 20, TrainState(step=4))
    assert (result.finished, result.state.step, recorded.saved_steps) == (False, 4, []), "nothing to save"
    assert not (tmp_path / "STOP").exists()
    result = train(replace(work, controls=Controls(tmp_path, StopSignal(), work.world)), 6, TrainState(step=4))
    assert [row["step"] for row in recorded.rows if "val/loss" in row] == [5, 6]
    assert recorded.saved_steps == [5, 6]
    assert not [name for name in ("SAVE", "EVAL", "STOP") if (tmp_path / name).exists()]


def test_a_validation_that_a_stop_interrupts_is_repeated_by_the_next_launch(recipe: Recipe, tmp_path: Path) -> None:
    recorded, model, asked = Recorded(), Model(), StopSignal()
    work = parts(recipe, model, tmp_path, recorded)
    validate = work.validator.validate_unless

    def stopped(stop: Callable[[], bool], scorer: Any) -> Any:
        if recorded.rows and recorded.rows[-1]["step"] == 2:
            asked.requested = "SIGTERM"
        return validate(stop, scorer)

    given: Any = work.validator
    given.validate_unless = stopped
    result = train(replace(work, controls=Controls(tmp_path, asked, work.world)), 6, None)
    assert (result.finished, result.state.step, result.state.validation_due) == (False, 2, True)
    given.validate_unless = validate
    end = train(replace(work, controls=Controls(tmp_path, StopSignal(), work.world)), 6, result.state)
    assert end.finished
    assert [row["step"] for row in recorded.rows if "val/loss" in row] == [0, 2, 4, 6]


def test_a_disk_that_refuses_the_losses_of_windows_ends_the_run_at_the_last_step_only(
    recipe: Recipe, tmp_path: Path, logged: Logged
) -> None:
    recorded = Recorded()
    work = replace(parts(recipe, Model(), tmp_path, recorded), eval_dir=tmp_path / "missing")
    with pytest.raises(StorageError, match=r"validation-step-00000005\.json\S* cannot be written"):
        train(work, 5, TrainState(step=3))
    assert [line[:7] for line in logged() if "has the mean" in line] == ["WARNING"]
    assert [row["step"] for row in recorded.rows if "val/loss" in row] == [4]


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


def test_tasks_run_at_their_steps_after_the_validation_and_before_the_checkpoint(
    recipe: Recipe, tmp_path: Path
) -> None:
    recorded = Recorded()
    work = parts(recipe, Model(), tmp_path, recorded)
    saved: Any = work.saver
    seen: list[tuple[int, bool, list[int]]] = []

    def look(state: TrainState, stop: Callable[[], bool]) -> bool:
        assert not stop()
        validated = any(row["step"] == state.step and "val/loss" in row for row in recorded.rows)
        seen.append((state.step, validated, [done.step for done in saved.states]))
        return True

    assert train(replace(work, tasks=(Periodic(3, look),)), 7, None).finished
    assert seen == [(0, True, []), (3, False, []), (6, True, [3]), (7, True, [3, 6])]


def test_a_task_that_a_stop_interrupts_is_repeated_by_the_next_launch(recipe: Recipe, tmp_path: Path) -> None:
    work = parts(recipe, Model(), tmp_path, Recorded())
    answers, after = iter([True, False, True, True]), []

    def first(_state: TrainState, _stop: Callable[[], bool]) -> bool:
        return next(answers)

    def second(state: TrainState, _stop: Callable[[], bool]) -> bool:
        after.append(state.step)
        return True

    work = replace(work, tasks=(Periodic(3, first), Periodic(1, second)))
    result = train(work, 6, TrainState(step=1))
    assert (result.finished, result.state.step, result.state.validation_due, after) == (False, 6, True, [2, 3, 4, 5])
    given: Any = work.saver
    assert given.states[-1] == result.state
    assert train(work, 6, result.state).finished
    assert after == [2, 3, 4, 5, 6]
