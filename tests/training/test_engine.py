"""One update and one evaluation of DeepSpeed's own engine in a group of one; other groups are in tests/end_to_end."""

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters
from torch.nn import functional

from inheritune_ds.checkpoints.train_state import Requests
from inheritune_ds.distributed.process_group import leave_process_group, start_process_group
from inheritune_ds.distributed.world import World, export
from inheritune_ds.errors import CorpusError
from inheritune_ds.training import block_wrapping
from inheritune_ds.training.engine import Engine
from inheritune_ds.training.micro_batch import measure_peak
from inheritune_ds.training.packing import DocumentPacking
from inheritune_ds.training.update_gate import agreed, count_targets, totals
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # DeepSpeed's own
VOCABULARY, SEQ_LEN, WINDOWS = tiny.LLAMA["vocab_size"], 32, 8
RECIPE = tiny.recipe(
    target={"shape": {**tiny.LLAMA, "num_hidden_layers": 1}},
    training={"seq_len": SEQ_LEN, "global_batch_tokens": SEQ_LEN * WINDOWS, "duration": "50 steps"},
)
MAIN = World(0, 1, 0, 1, "single")
LAYOUTS = [(1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"), (1, "fp16"), (3, "fp16")]
Make = Callable[..., Engine]


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """The process group of one rank, on a CPU that DeepSpeed lets compute in half precision."""
    with patch.dict(os.environ):
        os.environ["DS_ACCELERATOR"] = "cpu"
        export(MAIN, os.environ)
        start_process_group(MAIN)
        from deepspeed.accelerator import get_accelerator

        types = [torch.float, torch.half, torch.bfloat16]
        with (
            patch.object(get_accelerator(), "is_fp16_supported", lambda: True),
            patch.object(get_accelerator(), "supported_dtypes", lambda: types),
            patch.object(functional, "linear", functional.linear),  # ZeRO-3 replaces it for the rest of the process
        ):
            yield
        leave_process_group()


@pytest.fixture
def make(group: None) -> Iterator[Make]:
    """Engines that are closed at the end."""
    made: list[Engine] = []

    def build(stage: int = 1, precision: str = "fp32", **how: Any) -> Engine:
        made.append(tiny.engine(RECIPE, MAIN, stage=stage, precision=precision, micro_batch=4, **how))
        return made[-1]

    yield build
    for engine in made:
        engine.close()


def windows() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, (WINDOWS, SEQ_LEN + 1)))


def step(engine: Engine, **how: Any) -> Any:
    return engine.train_step(list(windows().view(2, 4, -1)), lr=1e-3, **how)


def losses_of(model: Any) -> torch.Tensor:
    """Mean loss of every window, as transformers computes the logits."""
    logits = model(input_ids=windows()[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.transpose(1, 2), windows()[:, 1:], reduction="none").mean(1)


def state(engine: Engine) -> str:
    """Hash of the fp32 master weights."""
    return hashlib.sha256(b"".join(value.numpy().tobytes() for _, value in engine.full_parameters())).hexdigest()


@pytest.mark.parametrize(("stage", "precision"), LAYOUTS)
def test_an_update_is_that_of_the_mean_over_all_tokens(stage: int, precision: str, make: Make) -> None:
    model = tiny.model(RECIPE)
    loss = losses_of(model).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    engine = make(stage, precision, zero_optimization={"sub_group_size": 1000} if stage == 3 else {})
    before, found = state(engine), step(engine)
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-6 if precision == "fp32" else 1e-4)
    # of all groups of stage 3 together, and without the loss scale of fp16
    assert found.grad_norm == pytest.approx(float(norm), rel=1e-5 if precision == "fp32" else 1e-2)
    assert (found.applied, found.fault, found.requests) == (True, None, Requests())
    assert 0.0 < found.passes_s < 60.0
    assert {group["lr"] for group in engine._engine.optimizer.param_groups} == {1e-3}
    assert state(engine) != before


def test_freeing_bf16_gradients_early_changes_no_bit(make: Make) -> None:
    runs = [make(1, "bf16", bf16={"enabled": True, "immediate_grad_update": early}) for early in (True, False)]
    for _ in range(14):
        first, second = (step(engine) for engine in runs)
        assert (first.loss, first.grad_norm) == (second.loss, second.grad_norm)
    assert state(runs[0]) == state(runs[1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_never_waits_for_the_whole_device(precision: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator

    engine, waits = make(1, precision), []
    monkeypatch.setattr(get_accelerator(), "synchronize", lambda *_: waits.append(1))
    for _ in range(5):
        step(engine)
    assert waits == []


def spoil_loss(engine: Engine, value: float) -> Any:
    return engine.module.register_forward_hook(lambda _module, _given, out: tuple(part * value for part in out))


def spoil_gradient(engine: Engine, value: float) -> Any:
    (parameter,) = (own for name, own in engine.module.named_parameters() if name == "model.norm.weight")
    return parameter.register_hook(lambda gradient: gradient * value)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_an_update_that_is_not_finite_is_skipped(stage: int, precision: str, make: Make) -> None:
    engine = make(stage, precision)
    before = state(engine)
    for spoil, value, fault in (
        (spoil_loss, math.nan, "the loss is nan"),
        (spoil_loss, math.inf, "the loss is inf"),
        (spoil_gradient, math.nan, "the gradient is not finite"),
    ):
        hook = spoil(engine, value)
        found = step(engine)
        hook.remove()
        assert (found.applied, found.fault, found.grad_norm) == (False, fault, math.inf)
        assert state(engine) == before
    assert step(engine).applied
    assert state(engine) != before


@pytest.mark.parametrize(("stage", "precision"), LAYOUTS)
def test_the_judge_is_asked_once_before_the_update_with_global_numbers(stage: int, precision: str, make: Make) -> None:
    engine, asked = make(stage, precision), []
    before = state(engine)

    def judge(loss: float, grad_norm: float) -> str | None:
        asked.append((loss, grad_norm))
        return "a spike" if len(asked) == 1 else None

    first, second = step(engine, judge=judge), step(engine, judge=judge)
    assert (first.applied, first.fault) == (False, "a spike")
    assert (second.applied, second.fault) == (True, None)
    assert asked == [(first.loss, first.grad_norm), (second.loss, second.grad_norm)]
    assert asked[0] == asked[1]
    assert state(engine) != before


@pytest.mark.parametrize(
    ("power", "spoil", "value", "fault", "factor"),
    [
        (40, None, 1.0, None, 0.5),
        (0, spoil_gradient, math.inf, "the gradient is not finite", 1.0),
        (40, spoil_loss, math.nan, "the loss is nan", 1.0),
    ],
    ids=["is lowered", "cannot be lowered", "would not help"],
)
@pytest.mark.parametrize("stage", [1, 3])
def test_a_loss_scale_that_was_too_large_is_no_fault_while_it_can_be_lowered(  # noqa: PLR0917
    stage: int, power: int, spoil: Any, value: float, fault: str | None, factor: float, make: Make
) -> None:
    engine = make(stage, "fp16", fp16={"initial_scale_power": power, "hysteresis": 1})
    if spoil:
        spoil(engine, value)
    found = step(engine)
    assert (found.applied, found.fault, found.grad_norm) == (False, fault, math.inf)
    assert engine._engine.optimizer.loss_scale == 2.0**power * factor


def test_all_copies_of_a_bf16_gradient_are_judged(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, own = make(1, "bf16"), dist.all_reduce
    assert engine._gate is not None
    engine._gate._ranks = 2

    def damaged_elsewhere(tensor: torch.Tensor, *given: Any, **how: Any) -> Any:
        if how.get("op") == dist.ReduceOp.MAX:
            return tensor.fill_(math.inf)
        return own(tensor, *given, **how)

    monkeypatch.setattr(dist, "all_reduce", damaged_elsewhere)
    found = step(engine)
    assert (found.applied, found.fault, found.grad_norm) == (False, "the gradient is not finite", math.inf)


REQUESTS = [Requests(stop=True), Requests(save=True), Requests(evaluate=True), Requests(save=True, evaluate=True)]


@pytest.mark.parametrize("requests", REQUESTS)
def test_a_request_to_any_rank_counts_for_all(requests: Requests, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert step(make(), requests=requests).requests == requests
    other = torch.tensor([5.0, requests.stop, requests.save, requests.evaluate])
    monkeypatch.setattr(dist, "all_reduce", lambda sums: sums.add_(other))
    assert agreed(totals(Requests(), torch.device("cpu"))) == (5.0, requests)


def test_a_token_id_outside_the_vocabulary_is_refused_on_all_ranks(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, rows = make(), windows()
    rows[5, 2] = VOCABULARY
    before = state(engine)
    with pytest.raises(CorpusError) as caught:
        engine.train_step(list(rows.view(2, 4, -1)), lr=0.1)
    assert caught.value.problem == "step 1: the batch has token id 257, but the model has 257 tokens"
    assert caught.value.allowed == "0 to 256"
    assert "a token file is damaged" in caught.value.action
    assert state(engine) == before

    def all_reduce(tensor: torch.Tensor, op: Any = None) -> None:
        tensor.copy_(torch.tensor(301) if op == dist.ReduceOp.MAX else tensor + torch.tensor([40, 1]))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with pytest.raises(CorpusError, match="token id 301"):
        count_targets([windows()], None, vocabulary=257, step=1, ranks=2, device=torch.device("cpu"))


@pytest.mark.parametrize("stage", [1, 3])
def test_evaluation_leaves_the_model_training(stage: int, make: Make) -> None:
    engine, rows = make(stage), windows().numpy()
    found = engine.window_losses([rows[:3], rows[3:6], rows[6:]])
    assert [part.shape for part in found] == [(3, SEQ_LEN), (3, SEQ_LEN), (2, SEQ_LEN)]
    assert np.concatenate(found).mean(axis=1) == pytest.approx(losses_of(tiny.model(RECIPE)).detach().numpy(), rel=1e-5)
    assert engine.module.training
    logits = engine.probe_logits(rows[:1])
    assert logits.shape == (1, SEQ_LEN + 1, VOCABULARY)
    assert not logits.requires_grad
    assert engine.module.training


def test_deepspeed_s_memory_lines_are_printed_on_request_only(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    make(1, "bf16")
    assert "Max_MA" not in capsys.readouterr().out
    make(1, "bf16", memory_breakdown=True)
    assert "Max_MA" in capsys.readouterr().out


def test_every_trial_of_a_micro_batch_is_compiled(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # graphs without code
    monkeypatch.setattr(block_wrapping, "_SPARE_GRAPHS", 0)
    torch._dynamo.reset()

    def build(size: int, _micro_steps: int) -> Engine:
        engine: Engine = tiny.engine(RECIPE, MAIN, micro_batch=size, kernels={"compile": True})
        counters.clear()  # of the probe
        return engine

    graphs = []
    with dynamo.patch(recompile_limit=2):
        for size in (1, 2, 4):
            measure_peak(build, size, accumulation=WINDOWS // size, seq_len=SEQ_LEN, vocab_size=VOCABULARY)
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [2] * 3, "a block and the loss"


@pytest.mark.parametrize(("stage", "precision", "packing"), [(1, "bf16", DocumentPacking(5)), (3, "fp32", None)])
def test_the_deterministic_mode_refuses_no_operator_of_a_step(
    stage: int, precision: str, packing: DocumentPacking | None, make: Make
) -> None:
    usual = make(stage, precision, packing=packing)
    step(usual)
    torch.use_deterministic_algorithms(mode=True)
    try:
        engine = make(stage, precision, packing=packing, kernels={"deterministic": True})
        step(engine)
        losses = engine.window_losses([windows().numpy()])
    finally:
        torch.use_deterministic_algorithms(mode=False)
    assert engine.kernels.deterministic
    assert state(engine) == state(usual), "a CPU is deterministic by itself"
    assert np.array_equal(losses, usual.window_losses([windows().numpy()]))
