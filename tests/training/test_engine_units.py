"""The engine's own arithmetic, on a stand-in for DeepSpeed's engine; real runs are in tests/end_to_end."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from inheritune_ds.errors import MachineError, StorageError, TrainingError
from inheritune_ds.training import engine as engine_module
from inheritune_ds.training.engine import Engine, StepResult, check_device, start_process_group
from inheritune_ds.training.loop import seed_step
from inheritune_ds.training.loss import HeadLoss, _chunk_gradients
from inheritune_ds.training.packing import DocumentPacking, WindowInputs
from inheritune_ds.training.world import World

VOCABULARY, SEQ_LEN, WINDOWS = 7, 5, 8
MAIN = World(0, 1, 0, 1, "single")


class Output:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Output:  # noqa: FBT001
        assert use_cache is False
        return Output(self.table(input_ids))


class FakeDeepSpeed:
    """What the engine uses of DeepSpeed's: it steps at the boundary of the accumulation."""

    device = "cpu"

    def __init__(self, steps: int, *, grad_norm: float = 0.5, applied: bool = True) -> None:
        self.module: Any = Model()
        HeadLoss(cast("Any", self.module), "plain", _chunk_gradients)
        self.optimizer = torch.optim.SGD([{"params": self.module.parameters()}], lr=99.0)
        self._steps, self._grad_norm, self._applied = steps, grad_norm, applied
        self.global_steps = 6  # optimizer updates so far
        self._calls_of_step = 0
        self.calls: list[str] = []

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def backward(self, loss: torch.Tensor, *, scale_wrt_gas: bool) -> None:
        assert not scale_wrt_gas
        self.calls.append("backward")
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        self.calls.append("step")
        self._calls_of_step += 1
        self.global_steps += self._calls_of_step % self._steps == 0

    def was_step_applied(self) -> bool:
        return self._applied

    def get_global_grad_norm(self) -> float:
        return self._grad_norm

    def eval(self) -> None:
        self.module.eval()
        self.calls.append("eval")

    def train(self) -> None:
        self.module.train()
        self.calls.append("train")

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str | None, dict[str, Any]]:
        return (None if folder.endswith("empty") else f"{folder}/{tag}"), {}


@pytest.fixture(autouse=True)
def meetings(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What is summed over the ranks; one process has nobody to sum with."""
    summed: list[torch.Tensor] = []

    def all_reduce(tensor: torch.Tensor) -> None:
        summed.append(tensor.clone())
        if tensor.dtype == torch.int64:  # the target tokens: the other rank has as many
            tensor *= 2

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return summed


def make(deepspeed: FakeDeepSpeed, world: World = MAIN, packing: DocumentPacking | None = None) -> Engine:
    engine = Engine.__new__(Engine)  # without `deepspeed.initialize`
    engine._engine = deepspeed
    engine.world, engine.module = world, deepspeed.module
    engine._windows = WindowInputs(packing, "eager")
    return engine


def tokens() -> npt.NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, VOCABULARY, (WINDOWS, SEQ_LEN + 1))


def cut(rows: npt.NDArray[np.int64], size: int) -> list[torch.Tensor]:
    return [torch.from_numpy(rows[start : start + size]) for start in range(0, len(rows), size)]


def whole_batch() -> tuple[float, torch.Tensor]:
    """Loss and gradient of the mean over all tokens at once."""
    model, rows = Model(), torch.from_numpy(tokens())
    loss = functional.cross_entropy(model.table(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    assert model.table.weight.grad is not None
    return float(loss.detach()), model.table.weight.grad


def gradient(engine: Engine) -> torch.Tensor:
    found = engine.module.get_parameter("table.weight").grad
    assert found is not None
    return found


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_train_step_gives_the_mean_over_all_tokens_however_they_are_cut(size: int) -> None:
    deepspeed = FakeDeepSpeed(WINDOWS // size)
    engine = make(deepspeed)
    result = engine.train_step(cut(tokens(), size), lr=0.25, stop=False)
    loss, expected = whole_batch()
    assert result.loss == pytest.approx(loss, rel=1e-6)
    assert result == StepResult(result.loss, 0.5, applied=True, stop=False, passes_s=result.passes_s)
    assert 0.0 < result.passes_s < 60.0
    torch.testing.assert_close(gradient(engine), expected)
    assert deepspeed.calls == ["backward", "step"] * (WINDOWS // size)
    assert [group["lr"] for group in deepspeed.optimizer.param_groups] == [0.25]


def test_ranks_average_to_the_gradient_of_the_whole_batch(meetings: list[torch.Tensor]) -> None:
    gradients = []
    for rank in range(2):
        engine = make(FakeDeepSpeed(2), World(rank, 2, rank, 2, "env"))
        engine.train_step(cut(tokens()[rank * 4 : rank * 4 + 4], 2), lr=0.1, stop=rank == 1)
        gradients.append(gradient(engine))
    loss, expected = whole_batch()
    torch.testing.assert_close((gradients[0] + gradients[1]) / 2, expected)
    assert [int(count) for count in meetings[::2]] == [4 * SEQ_LEN] * 2
    totals = meetings[1] + meetings[3]
    assert totals.dtype == torch.float64
    assert float(totals[0]) / (WINDOWS * SEQ_LEN) == pytest.approx(loss, rel=1e-6)
    assert float(totals[1]) == 1.0


@pytest.mark.parametrize("size", [1, 3, 8])
def test_padding_counts_nowhere_however_it_is_spread(size: int) -> None:
    rows = tokens()
    for row in range(WINDOWS):
        rows[row, SEQ_LEN + 1 - row % 4 :] = -100
    engine = make(FakeDeepSpeed(-(-WINDOWS // size)))
    result = engine.train_step(cut(rows, size), lr=0.25, stop=False)
    model, given = Model(), torch.from_numpy(rows)
    logits = model.table(given[:, :-1].clamp(min=0))
    loss = functional.cross_entropy(logits.flatten(0, 1), given[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    torch.testing.assert_close(gradient(engine), model.table.weight.grad)


def test_any_rank_s_wish_to_stop_is_everybody_s(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make(FakeDeepSpeed(1)).train_step(cut(tokens(), 8), lr=0.1, stop=True).stop
    monkeypatch.setattr(dist, "all_reduce", lambda totals: totals.add_(torch.tensor([0.0, 1.0])))
    assert make(FakeDeepSpeed(1)).train_step(cut(tokens(), 8), lr=0.1, stop=False).stop


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_before_the_update(value: float) -> None:
    deepspeed = FakeDeepSpeed(2)
    with torch.no_grad():
        deepspeed.module.table.weight[0, 0] = value
    rows = tokens()
    rows[:, :2] = 0
    with pytest.raises(TrainingError) as caught:
        make(deepspeed).train_step(cut(rows, 4), lr=0.1, stop=False)
    assert caught.value.problem == "the loss of step 7 is nan: nothing after it would be worth having"
    assert "lower optimizer.lr" in caught.value.action
    assert deepspeed.calls == ["backward", "step", "backward"]  # the step at the boundary was not made


def test_a_gradient_that_is_not_finite_ends_the_run_when_it_was_applied() -> None:
    with pytest.raises(TrainingError, match="the gradient norm of step 7 is nan"):
        make(FakeDeepSpeed(1, grad_norm=math.nan)).train_step(cut(tokens(), 8), lr=0.1, stop=False)
    skipped = make(FakeDeepSpeed(1, grad_norm=math.inf, applied=False))
    assert skipped.train_step(cut(tokens(), 8), lr=0.1, stop=False).applied is False


def test_window_losses_are_means_of_each_window() -> None:
    deepspeed = FakeDeepSpeed(1)
    rows = tokens()
    found = make(deepspeed).window_losses([rows[:3], rows[3:6], rows[6:]])
    assert [len(part) for part in found] == [3, 3, 2]
    for row, loss in zip(rows, np.concatenate(found), strict=True):
        target = torch.from_numpy(row)
        expected = functional.cross_entropy(deepspeed.module.table(target[:-1]), target[1:])
        assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    assert deepspeed.calls == ["eval", "train"]
    assert deepspeed.module.training


def test_probe_logits_are_those_of_evaluation_and_leave_the_model_training() -> None:
    deepspeed = FakeDeepSpeed(1)
    logits = make(deepspeed).probe_logits(tokens()[:1])
    assert logits.shape == (1, SEQ_LEN + 1, VOCABULARY)
    assert not logits.requires_grad
    assert deepspeed.calls == ["eval", "train"]


def test_load_says_that_there_is_no_state(tmp_path: Path) -> None:
    make(FakeDeepSpeed(1)).load(tmp_path / "full")
    with pytest.raises(TrainingError, match="DeepSpeed found no state in"):
        make(FakeDeepSpeed(1)).load(tmp_path / "empty")


@pytest.mark.parametrize("gpu", [False, True])
def test_the_compiler_is_checked_where_cpu_operators_are_built(
    gpu: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(MachineError, match=r"no C\+\+ compiler found \(/nonexistent\)"):
        # on a GPU the CPU operators are built for offload only
        check_device("cuda" if gpu else "cpu", MAIN, offload=gpu)
    if gpu:
        check_device("cuda", MAIN, offload=False)


def test_a_gpu_that_torch_cannot_use_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_device("cpu", MAIN, offload=False)
    with pytest.raises(MachineError) as caught:
        check_device("cuda", MAIN, offload=False)
    assert caught.value.problem == f"this machine has a GPU, but torch {torch.__version__} cannot use it"
    assert "DS_ACCELERATOR=cpu" in caught.value.action


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device("cuda", World(3, 4, 1, 2, "env"), offload=False)
    check_device("cuda", World(3, 4, 0, 4, "slurm"), offload=False)  # srun may show each rank its own GPU only
    with pytest.raises(MachineError) as caught:
        check_device("cuda", World(0, 4, 0, 4, "env"), offload=False)
    assert caught.value.problem == "4 ranks on this machine, but torch sees 2 GPUs"
    assert caught.value.action == "start at most 2 ranks (deepspeed --num_gpus N)"


def test_ranks_that_cannot_meet_name_address_and_port(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed

    def refuse(**_: object) -> None:
        raise dist.DistNetworkError("EADDRINUSE\nC++ frames")

    monkeypatch.setattr(deepspeed, "init_distributed", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(MachineError) as caught:
        start_process_group(MAIN)
    assert caught.value.problem == "the ranks cannot meet at node1:29500: EADDRINUSE"
    assert "--master_port 29501" in caught.value.action


def test_a_process_joins_its_group_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    left: list[bool] = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append(True))
    met: list[bool] = []
    monkeypatch.setattr(dist, "barrier", lambda: met.append(True))
    start_process_group(MAIN)
    start_process_group(MAIN)
    assert met == [True, True]
    engine_module.leave_process_group()
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    engine_module.leave_process_group()
    assert left == [True]


@pytest.mark.parametrize("asked", [False, True])
def test_deepspeed_s_memory_lines_are_printed_only_when_they_are_asked_for(
    asked: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import deepspeed

    def initialize(**_: object) -> tuple[FakeDeepSpeed, None]:
        print("MA 0.02 GB")
        return FakeDeepSpeed(1), None

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    off = {"enabled": False}
    config = {"train_batch_size": 8, "bf16": off, "fp16": off, "optimizer": {"params": {"weight_decay": 0.1}}}
    model: Any = Model()
    monkeypatch.setattr(engine_module, "_fit", lambda *_: (SimpleNamespace(attention="eager"), ()))
    monkeypatch.setattr(engine_module, "_optimizer", lambda *_: {})
    Engine(model, {**config, "memory_breakdown": asked}, MAIN, cast("Any", None))
    assert ("MA 0.02 GB" in capsys.readouterr().out) is asked


def test_seed_step_makes_randomness_a_function_of_seed_step_and_rank() -> None:
    def draw(seed: int, step: int, rank: int) -> float:
        torch.rand(step + rank)  # what was drawn before does not matter
        seed_step(seed, step, rank)
        return float(torch.rand(()))

    assert draw(1, 2, 3) == draw(1, 2, 3)
    combinations = [(seed, step, rank) for seed in (1, 12) for step in (0, 1, 23, 3) for rank in (0, 1, 3)]
    assert len({draw(*combination) for combination in combinations}) == len(combinations)
    seed_step(1337, 0, 0)
    assert torch.initial_seed() == 5_906_761_872_107_461_528  # runs that were begun go on with it


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("[enforce fail at inline_container.cc:672] . unexpected pos 6720 vs 6614", StorageError),
        ("other", RuntimeError),
    ],
)
def test_a_disk_that_fills_while_torch_writes_is_a_storage_error(
    text: str, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(text)

    fake = FakeDeepSpeed(1)
    monkeypatch.setattr(fake, "save_checkpoint", refuse, raising=False)
    with pytest.raises(kind, match=r"cannot be written|other"):
        make(fake).save(tmp_path)
