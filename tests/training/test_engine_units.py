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

from inheritune_ds.checkpoints.train_state import Requests
from inheritune_ds.distributed import process_group
from inheritune_ds.distributed.process_group import start_process_group
from inheritune_ds.distributed.world import World
from inheritune_ds.errors import CorpusError, MachineError
from inheritune_ds.training import engine as engine_module
from inheritune_ds.training.engine import Engine, StepResult
from inheritune_ds.training.faults import not_finite
from inheritune_ds.training.loop import seed_step
from inheritune_ds.training.loss import HeadLoss, _chunk_gradients
from inheritune_ds.training.packing import DocumentPacking, WindowInputs
from inheritune_ds.training.toolchain import check_device
from inheritune_ds.training.update_gate import UpdateGate

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

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Output:  # noqa: FBT001
        assert use_cache is False
        return Output(self.table(input_ids))


class FakeScaler:
    """A loss scaler: a static one, or one of fp16 that can be lowered down to 1."""

    def __init__(self, scale: float | None) -> None:
        self.dynamic, self.cur_scale, self.min_scale = scale is not None, scale or 1.0, 1.0


class FakeOptimizer(torch.optim.SGD):
    """What the engine uses of DeepSpeed's ZeRO optimizer, which leaves updates out where `overflow` is set."""

    def __init__(self, module: nn.Module, grad_norm: float, *, found: bool, scale: float | None) -> None:
        super().__init__([{"params": module.parameters()}], lr=99.0)
        self._grad_norm, self._found = grad_norm, found
        self.loss_scaler, self.overflow = FakeScaler(scale), False
        self.cpu_offload, self.averaged_gradients = False, {0: ["sums"], 1: ["sums"]}
        self.told: list[bool] = []

    @property
    def loss_scale(self) -> float:
        return self.loss_scaler.cur_scale

    def scaled_global_norm(self) -> torch.Tensor:
        return torch.tensor(self._grad_norm * self.loss_scale)

    def _update_scale(self, overflow: bool) -> None:  # noqa: FBT001 - DeepSpeed's signature
        self.told.append(overflow)

    def update(self) -> None:
        self.overflow = self._found
        if not self.overflow:
            self.scaled_global_norm()
        self._update_scale(self.overflow)


class FakeDeepSpeed:
    """What the engine uses of DeepSpeed's: it steps at the boundary of the accumulation."""

    device = "cpu"

    def __init__(self, steps: int, *, grad_norm: float = 0.5, found: bool = False, scale: float | None = None) -> None:
        self.module: Any = Model()
        HeadLoss(cast("Any", self.module), "plain", _chunk_gradients)
        self.optimizer = FakeOptimizer(self.module, grad_norm, found=found, scale=scale)
        self._steps = steps
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
        if self._calls_of_step % self._steps == 0:
            self.optimizer.update()
            self.global_steps += 1

    def was_step_applied(self) -> bool:
        return not self.optimizer.overflow

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
        if tensor.dtype == torch.int64:  # the target tokens: the other rank has as many, and as good ones
            tensor *= 2

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return summed


def make(deepspeed: FakeDeepSpeed, world: World = MAIN, packing: DocumentPacking | None = None) -> Engine:
    engine = Engine.__new__(Engine)  # without `deepspeed.initialize`
    engine._engine = deepspeed
    engine._gate, engine._vocabulary = UpdateGate(deepspeed.optimizer, world.size), VOCABULARY
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
    result = engine.train_step(cut(tokens(), size), lr=0.25)
    loss, expected = whole_batch()
    assert result.loss == pytest.approx(loss, rel=1e-6)
    assert result == StepResult(result.loss, 0.5, applied=True, fault=None, wishes=Requests(), passes_s=result.passes_s)
    assert 0.0 < result.passes_s < 60.0
    torch.testing.assert_close(gradient(engine), expected)
    assert deepspeed.calls == ["backward", "step"] * (WINDOWS // size)
    assert [group["lr"] for group in deepspeed.optimizer.param_groups] == [0.25]


def test_ranks_average_to_the_gradient_of_the_whole_batch(meetings: list[torch.Tensor]) -> None:
    gradients = []
    for rank in range(2):
        engine = make(FakeDeepSpeed(2), World(rank, 2, rank, 2, "env"))
        engine.train_step(cut(tokens()[rank * 4 : rank * 4 + 4], 2), lr=0.1, wishes=Requests(stop=rank == 1))
        gradients.append(gradient(engine))
    loss, expected = whole_batch()
    torch.testing.assert_close((gradients[0] + gradients[1]) / 2, expected)
    assert [count.tolist() for count in meetings[::2]] == [[4 * SEQ_LEN, 0]] * 2
    totals = meetings[1] + meetings[3]
    assert totals.dtype == torch.float64
    assert float(totals[0]) / (WINDOWS * SEQ_LEN) == pytest.approx(loss, rel=1e-6)
    assert totals[1:].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_padding_counts_nowhere_however_it_is_spread(size: int) -> None:
    rows = tokens()
    for row in range(WINDOWS):
        rows[row, SEQ_LEN + 1 - row % 4 :] = -100
    engine = make(FakeDeepSpeed(-(-WINDOWS // size)))
    result = engine.train_step(cut(rows, size), lr=0.25)
    model, given = Model(), torch.from_numpy(rows)
    logits = model.table(given[:, :-1].clamp(min=0))
    loss = functional.cross_entropy(logits.flatten(0, 1), given[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    torch.testing.assert_close(gradient(engine), model.table.weight.grad)


WISHES = [Requests(stop=True), Requests(save=True), Requests(evaluate=True), Requests(save=True, evaluate=True)]


@pytest.mark.parametrize("wishes", WISHES)
def test_any_rank_s_wish_is_everybody_s(wishes: Requests, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make(FakeDeepSpeed(1)).train_step(cut(tokens(), 8), lr=0.1, wishes=wishes).wishes == wishes
    other = torch.tensor([0.0, wishes.stop, wishes.save, wishes.evaluate])
    monkeypatch.setattr(dist, "all_reduce", lambda totals: totals.add_(other))
    assert make(FakeDeepSpeed(1)).train_step(cut(tokens(), 8), lr=0.1).wishes == wishes


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_the_update_out(value: float) -> None:
    deepspeed = FakeDeepSpeed(2)
    with torch.no_grad():
        deepspeed.module.table.weight[0, 0] = value
    rows = tokens()
    rows[:, :2] = 0
    result = make(deepspeed).train_step(cut(rows, 4), lr=0.1)
    assert (result.applied, result.fault, result.grad_norm) == (False, "the loss is nan", 0.5)
    assert deepspeed.calls == ["backward", "step"] * 2  # the step at the boundary clears the gradients


@pytest.mark.parametrize(
    ("grad_norm", "found"),
    [(math.inf, False), (math.nan, False), (0.5, True)],
    ids=["inf", "nan", "found by DeepSpeed"],
)
def test_a_gradient_that_is_not_finite_leaves_the_update_out(grad_norm: float, found: bool) -> None:  # noqa: FBT001
    deepspeed = FakeDeepSpeed(1, grad_norm=grad_norm, found=found)
    result = make(deepspeed).train_step(cut(tokens(), 8), lr=0.1)
    assert (result.applied, result.fault) == (False, "the gradient is not finite")
    assert not math.isfinite(result.grad_norm)
    assert deepspeed.optimizer.told == []


def test_the_judge_is_asked_once_before_the_update_with_global_numbers() -> None:
    deepspeed, asked = FakeDeepSpeed(2, grad_norm=3.0), []

    def judge(loss: float, grad_norm: float) -> str | None:
        asked.append((loss, grad_norm, list(deepspeed.calls), deepspeed.global_steps))
        return "a spike" if len(asked) == 1 else None

    engine = make(deepspeed)
    first, second = (engine.train_step(cut(tokens(), 4), lr=0.1, judge=judge) for _ in range(2))
    assert (first.applied, first.fault, first.grad_norm) == (False, "a spike", 3.0)
    assert (second.applied, second.fault, second.grad_norm) == (True, None, 3.0)
    assert asked[0] == (first.loss, 3.0, ["backward", "step"] * 2, 6)
    assert len(asked) == 2
    assert deepspeed.optimizer.told == [False]  # a scaler hears of applied updates only


@pytest.mark.parametrize(
    ("scale", "spoiled", "fault", "told"),
    [
        (65536.0, False, None, [True]),
        (1.0, False, "the gradient is not finite", []),
        (65536.0, True, "the loss is nan", []),
    ],
    ids=["is lowered", "cannot be lowered", "would not help"],
)
def test_a_loss_scale_that_was_too_large_is_no_fault_while_it_can_be_lowered(
    scale: float,
    spoiled: bool,  # noqa: FBT001
    fault: str | None,
    told: list[bool],
) -> None:
    deepspeed = FakeDeepSpeed(1, found=True, scale=scale)
    if spoiled:
        with torch.no_grad():
            deepspeed.module.table.weight.fill_(math.nan)
    result = make(deepspeed).train_step(cut(tokens(), 8), lr=0.1)
    assert (result.applied, result.fault, deepspeed.optimizer.told) == (False, fault, told)


def test_the_norm_is_told_without_the_loss_scale() -> None:
    assert make(FakeDeepSpeed(1, grad_norm=0.25, scale=1024.0)).train_step(cut(tokens(), 8), lr=0.1).grad_norm == 0.25


@pytest.mark.parametrize("offload", [False, True])
def test_sums_in_host_memory_are_forgotten_with_the_update(offload: bool) -> None:  # noqa: FBT001
    deepspeed = FakeDeepSpeed(1, found=True)
    deepspeed.optimizer.cpu_offload = offload
    make(deepspeed).train_step(cut(tokens(), 8), lr=0.1)
    kept = None if offload else ["sums"]
    assert deepspeed.optimizer.averaged_gradients == {0: kept, 1: kept}


class NormGroups:
    """Of stage 3: a norm for each group, -1 for one that is not finite."""

    def __init__(self, *norms: float) -> None:
        self._norms, self.overflow, self.loss_scale, self.loss_scaler = norms, False, 1.0, FakeScaler(None)

    def _get_norm_groups(self) -> list[torch.Tensor]:
        return [torch.tensor(norm) for norm in self._norms]

    def _update_scale(self, overflow: bool) -> None:  # noqa: FBT001
        """Nothing is scaled."""


@pytest.mark.parametrize(("norms", "whole"), [((3.0, 4.0), 5.0), ((3.0, -1.0), math.inf)])
def test_stage_3_norms_are_joined_before_they_are_judged(norms: tuple[float, ...], whole: float) -> None:
    optimizer = NormGroups(*norms)
    gate = UpdateGate(optimizer, 1)
    gate.expect(2.0, not_finite)
    assert [float(norm) for norm in optimizer._get_norm_groups()] == list(norms)
    optimizer._update_scale(False)
    assert gate.grad_norm == whole
    assert optimizer.overflow is (whole == math.inf)


class GivesGradients:
    """Of the bf16 optimizer: whole gradients, before they are clipped."""

    def __init__(self, *gradients: list[float]) -> None:
        self._gradients = [torch.tensor(values) for values in gradients]

    def get_grads_for_norm(self, for_clipping: bool = False) -> Any:  # noqa: FBT001, FBT002
        return self._gradients if for_clipping else (self._gradients, {})


@pytest.mark.parametrize(
    ("gradients", "judged", "given"),
    [
        (([3.0], [0.0, 4.0]), 5.0, 5.0),
        (([3.0], [math.nan, 4.0]), math.inf, math.inf),
        (([3e5], [0.0, 4e5]), 5e5, math.inf),
    ],
    ids=["good", "nan", "spike"],
)
def test_the_bf16_optimizer_is_given_the_norm_or_infinity(
    gradients: tuple[list[float], ...],
    judged: float,
    given: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[Any] = []
    monkeypatch.setattr(dist, "all_reduce", lambda norm, op: compared.append((float(norm), op)))
    optimizer = GivesGradients(*gradients)
    gate = UpdateGate(optimizer, 2)
    gate.expect(2.0, lambda loss, norm: not_finite(loss, norm) or ("a spike" if norm > 10 else None))
    (norm,), of_experts = optimizer.get_grads_for_norm()
    assert (float(norm), gate.grad_norm, of_experts) == (given, judged, {})
    assert (gate.fault is None) is (given < math.inf)
    assert compared == [(judged, dist.ReduceOp.MAX)]
    assert len(optimizer.get_grads_for_norm(for_clipping=True)) == 2


def test_a_token_id_that_the_model_has_not_is_refused_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tokens()
    rows[5, 2] = VOCABULARY
    deepspeed = FakeDeepSpeed(2)
    with pytest.raises(CorpusError) as caught:
        make(deepspeed).train_step(cut(rows, 4), lr=0.1)
    assert caught.value.problem == "step 7: the batch has token id 7, but the model has 7 tokens"
    assert caught.value.allowed == "0 to 6"
    assert "a token file is damaged" in caught.value.action
    assert deepspeed.calls == []

    def all_reduce(tensor: torch.Tensor, op: Any = None) -> None:
        tensor.copy_(torch.tensor(31) if op == dist.ReduceOp.MAX else tensor + torch.tensor([40, 1]))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with pytest.raises(CorpusError, match="token id 31"):
        make(deepspeed, World(0, 2, 0, 2, "env")).train_step(cut(tokens(), 4), lr=0.1)


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
    process_group.leave_process_group()
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    process_group.leave_process_group()
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
