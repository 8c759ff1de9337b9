"""Started by the part `faults`: skipped updates, in one process group.

`python drive_faults.py '{"cases": [CASE, ...]}' OUT.json` under torchrun, a case being
zero<stage>-<precision>-<accumulation> with `-offload` behind it where DeepSpeed's CPU Adam is to take the step. For
each case one engine trains on good batches only, another one has a faulty step before each of them. Rank 0 writes
{case: figures}; a broken promise is in `broken`, in words.
"""

import hashlib
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from benchmarks.ranks import drive, gathered
from inheritune_ds.distributed.world import World
from inheritune_ds.errors import CorpusError
from tests import tiny

MICRO_BATCH, SEQ_LEN, MARKED = 2, 32, 256
"""MARKED is the token that the fault in data hangs on; good batches have none."""


def build(case: str, world: Any) -> Any:
    """An engine for a case."""
    stage, precision, accumulation, *offload = case.split("-")
    tokens = SEQ_LEN * MICRO_BATCH * int(accumulation) * world.size
    recipe = tiny.recipe(
        seed=11,
        target={"shape": {**tiny.LLAMA, "num_hidden_layers": 2}},
        training={"seq_len": SEQ_LEN, "global_batch_tokens": tokens, "duration": "50 steps"},
    )
    zero = {"offload_optimizer": {"device": "cpu"}} if offload else {}
    return tiny.engine(
        recipe,
        world,
        stage=int(stage.removeprefix("zero")),
        precision=precision,
        micro_batch=MICRO_BATCH,
        zero_optimization=zero,
    )


def batches(number: int, accumulation: int, rank: int) -> list[Any]:
    """The micro-batches of a rank in a step; the same at every call."""
    import torch

    draw = torch.Generator().manual_seed(1000 * number + rank)
    return [torch.randint(0, MARKED, (MICRO_BATCH, SEQ_LEN + 1), generator=draw) for _ in range(accumulation)]


def state_sha256(engine: Any) -> str:
    """Hash of this rank's weights, fp32 masters, moments, Adam's step counts and scales: all that a step may change."""
    import torch

    optimizer = engine._engine.optimizer  # noqa: SLF001 - there is no public way
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    for parameter in engine.module.parameters():
        add(getattr(parameter, "ds_tensor", parameter))
    masters = next(
        getattr(optimizer, name)
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")
        if hasattr(optimizer, name)
    )
    add(list(masters))
    add(list(optimizer.optimizer.state.values()))
    for group in optimizer.optimizer.param_groups:  # DeepSpeed's CPU Adam counts its steps there
        add({key: value for key, value in group.items() if key not in ("params", "lr")})
    return digest.hexdigest()


def spoiled_loss(engine: Any, value: float) -> Any:
    """The loss of a rank is a value, and so are its gradients."""
    return engine.module.register_forward_hook(lambda _module, _given, output: tuple(part * value for part in output))


def spoiled_gradient(engine: Any, value: float) -> Any:
    """One element of one tensor's gradient is a value, on a rank."""

    def spoil(gradient: Any) -> Any:
        changed = gradient.clone()
        changed.view(-1)[7] = value
        return changed

    return dict(engine.module.named_parameters())["model.layers.1.mlp.up_proj.weight"].register_hook(spoil)


def spoiled_row(engine: Any, value: float) -> Any:
    """The embedding of MARKED has a value in it: a batch that holds the token is spoiled."""
    import torch

    def spoil(_module: Any, given: Any, output: Any) -> Any:
        return torch.where((given[0] == MARKED).unsqueeze(-1), value, output)

    return engine.module.get_input_embeddings().register_forward_hook(spoil)


Spoil = Callable[[Any, float], Any]
"""Adds a hook to an engine; gives its handle, which removes it as a context manager."""
FAULTS: list[tuple[str, Spoil | None, float, int]] = [
    ("NaN in the loss of rank 1", spoiled_loss, math.nan, 1),
    ("NaN in one gradient element of rank 1", spoiled_gradient, math.nan, 1),
    ("Inf in one gradient element of rank 0", spoiled_gradient, math.inf, 0),
    ("Inf in the loss of rank 0", spoiled_loss, math.inf, 0),
    ("NaN behind a token of rank 1", spoiled_row, math.nan, 1),
    ("a spike", None, 0.0, 0),
    ("a token id that the model has not", None, 0.0, 1),
]
"""Name, fault, value, rank. The first comes before the optimizer has any moment."""


def faulty_step(engine: Any, fault: tuple[str, Spoil | None, float, int], given: list[Any], rank: int) -> str | None:
    """One step with a fault, on all ranks; returns the reason for skipping its update."""
    name, spoil, value, where = fault
    given = [batch.clone() for batch in given]
    here = rank == where
    if name.startswith("a token id"):
        if here:
            given[-1][0, 3] = 70_000
        try:
            engine.train_step(given, lr=1e-3)
        except CorpusError as error:
            return error.problem
        return None
    if spoil is None:
        result = engine.train_step(given, lr=1e-3, judge=lambda _loss, _norm: "a spike")
        return None if result.applied else result.fault
    if spoil is spoiled_row and here:
        given[0][0, 3] = MARKED
    with spoil(engine, value) if here or spoil is spoiled_row else nullcontext():
        result = engine.train_step(given, lr=1e-3)
    return None if result.applied else result.fault


def run_case(case: str, world: Any) -> dict[str, Any]:
    """Figures of one case, of this rank."""
    accumulation = int(case.split("-")[2])
    engine = build(case, world)
    straight = []
    for number in range(len(FAULTS)):
        result = engine.train_step(batches(number, accumulation, world.rank), lr=1e-3)
        straight.append((result.loss, result.grad_norm, state_sha256(engine)))
    engine.close()
    engine = build(case, world)
    broken, reasons = [], {}
    if not all(result[1] < math.inf for result in straight):
        broken.append("a good step has no norm")
    for number, fault in enumerate(FAULTS):
        before = state_sha256(engine)
        reasons[fault[0]] = reason = faulty_step(
            engine, fault, batches(100 + number, accumulation, world.rank), world.rank
        )
        if reason is None:
            broken.append(f"{fault[0]}: the update was not skipped")
        if state_sha256(engine) != before:
            broken.append(f"{fault[0]}: the state has changed")
        result = engine.train_step(batches(number, accumulation, world.rank), lr=1e-3)
        if (result.loss, result.grad_norm, state_sha256(engine)) != straight[number]:
            broken.append(f"{fault[0]}: the step after it differs from that of a run without it")
    engine.close()
    return {"faults": len(FAULTS), "reasons": reasons, "broken": broken}


def run(world: World, cases: list[str]) -> dict[str, Any]:
    """Figures of the cases; all ranks call it."""
    results = {}
    for case in cases:
        ranks = gathered(world, run_case(case, world))
        broken = [f"rank {rank}: {line}" for rank, found in enumerate(ranks) for line in found["broken"]]
        if any(found["reasons"] != ranks[0]["reasons"] for found in ranks):
            broken.append("the ranks give different reasons")
        results[case] = {**ranks[0], "broken": broken}
    return results


if __name__ == "__main__":
    drive(run, *sys.argv[1:])
