"""Launched by tests: measure the inside of a step. `drive_engine.py OUT.json [--compiled]` writes an object.

`accumulation`: loss and gradient of the same 16 windows in several splits: whole, padded, with documents kept apart.
`eager`, `compiled`: host synchronizations in each micro-step and compiled graphs after warm-up, without and with
documents kept apart.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.ranks import join_ranks
from inheritune_ds.distributed.world import detect
from tests import tiny

SYNCS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "unique")
"""Operators that make the host wait for a device."""
WARM_UP_STEPS, STEPS = 10, 15
EOS = 7


def build(size: int, accumulation: int, *, compiled: bool = False, precision: str = "fp32", documents: bool) -> Any:
    from inheritune_ds.training.packing import DocumentPacking

    recipe = tiny.recipe(
        training={"seq_len": 32, "global_batch_tokens": 32 * size * accumulation, "duration": "50 steps"},
        optimizer={"lr": 3e-3, "betas": [0.5, 0.95], "max_grad_norm": 0.0},
    )
    how: dict[str, Any] = {"packing": DocumentPacking(EOS) if documents else None, "kernels": {"compile": compiled}}
    return tiny.engine(recipe, detect(os.environ), precision=precision, micro_batch=size, **how)


def windows(kind: str) -> Any:
    """16 windows; `padded` ones lack 0 to 15 tokens at their end, those of `documents` have 0 to 15 ends."""
    import torch

    tokens = torch.randint(0, 257, (16, 33), generator=torch.Generator().manual_seed(1))
    for row in range(16):
        if kind == "padded":
            tokens[row, 33 - row :] = -100
        if kind == "documents":
            tokens[row, torch.arange(row) * 2 + row % 3] = EOS
    return tokens


def one_step(size: int, kind: str) -> dict[str, Any]:
    """Loss and gradient of a step; the gradient is Adam's first moment over 1 - beta1, in DeepSpeed's flat order."""
    engine = build(size, 16 // size, documents=kind == "documents")
    result = engine.train_step(list(windows(kind).split(size)), lr=1e-3)
    states = engine._engine.optimizer.optimizer.state.values()
    engine_gradient = [2.0 * value for state in states for value in state["exp_avg"].flatten().tolist()]
    engine.close()
    return {"loss": result.loss, "gradient": engine_gradient}


class Counted:
    """DeepSpeed's engine, watched in forward and backward passes and in each `step` without an update."""

    def __init__(self, inner: Any, watch: Callable[[], Any]) -> None:
        self._inner, self._watch = inner, watch
        self.micro_steps = 0

    def __call__(self, **inputs: Any) -> Any:
        with self._watch():
            return self._inner(**inputs)

    def backward(self, *given: Any, **named: Any) -> None:
        with self._watch():
            self._inner.backward(*given, **named)
        self.micro_steps += 1

    def step(self) -> None:
        with nullcontext() if self._inner.is_gradient_accumulation_boundary() else self._watch():
            self._inner.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def counter_of(seen: Counter[str]) -> Callable[[], Any]:
    """A context that counts the operators of SYNCS."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    return Watch


def counts(*, compiled: bool, documents: bool) -> dict[str, Any]:
    """Synchronizations in the micro-steps and compiled graphs after warm-up; of compiled code only the graphs."""
    import torch
    from torch._dynamo.utils import counters

    seen: Counter[str] = Counter()
    watch = counter_of(seen)
    engine = build(4, 4, compiled=compiled, precision="bf16", documents=documents)
    inner = engine._engine

    def batches(step: int) -> list[Any]:
        tokens = windows("documents")
        tokens[0, :step] = EOS  # another number of targets in every step, if documents are kept apart
        return list(tokens.split(4))

    for step in range(WARM_UP_STEPS):
        engine.train_step(batches(step), lr=1e-3)
    graphs = counters["stats"]["unique_graphs"]
    counted = Counted(inner, watch)
    engine._engine = inner if compiled else counted
    for step in range(WARM_UP_STEPS, WARM_UP_STEPS + STEPS):
        engine.train_step(batches(step), lr=1e-3)
    engine._engine = inner
    engine.close()
    syncs = sum(seen[name] for name in SYNCS)
    with watch():
        float(torch.ones(1))
    return {
        "micro_steps": counted.micro_steps,
        "operators": sum(seen.values()),
        "syncs": syncs,
        "counter_sees": sum(seen[name] for name in SYNCS) - syncs,
        "graphs": graphs,
        "recompiled": counters["stats"]["unique_graphs"] - graphs,
        "graph_breaks": sum(counters["graph_break"].values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--compiled", action="store_true")
    args = parser.parse_args()
    join_ranks()
    from inheritune_ds.distributed.process_group import end_rank

    cuts = [(size, kind) for kind in ("whole", "padded", "documents") for size in (16, 4, 1)]
    result = {
        "accumulation": [{"size": size, "kind": kind, **one_step(size, kind)} for size, kind in cuts],
        "eager": [counts(compiled=False, documents=documents) for documents in (False, True)],
        "compiled": [counts(compiled=True, documents=documents) for documents in (False, True) if args.compiled],
    }
    args.out.write_text(json.dumps(result), encoding="utf-8")
    end_rank()


if __name__ == "__main__":
    main()
