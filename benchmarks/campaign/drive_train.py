"""Launched by the campaign: train.py's own main, with one trouble in it.

`TROUBLE=KIND:... drive_train.py ARGUMENTS`, with the arguments of train.py. Kinds:

    pause:PHASE:STEP:SECONDS  Every rank sleeps in a phase, once, from a step on, so that a signal arrives there; first
                              it writes its process id to `paused-RANK`. `preparing` is rank 0's work before training.
    hang:PLACE:RANK           One rank sleeps for ever; first it writes the file `hung`. Places inside the loop sleep
                              from the sixth step on, which a checkpoint precedes.
    spoil:BAD:FIRST:END       Batches spoil the loss of the last rank: `5,6,7`, or `5+` for all from the fifth on. The
                              order of the data does not have the batches from FIRST to END.
    secret:                   Training fails with secrets in the message.
"""

import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

STEPS_BEFORE = 5
MARKED = 299
"""The last token of the vocabulary represents a damaged one: its embedding is NaN, and only bad batches have it."""


def sleep_once(seconds: float) -> None:
    """Write the process id of this rank, then sleep."""
    path = Path(f"paused-{os.environ.get('RANK', '0')}")
    if not path.exists():
        path.with_suffix(".tmp").write_text(str(os.getpid()), encoding="utf-8")
        path.with_suffix(".tmp").rename(path)
        time.sleep(seconds)


def pause(phase: str, step: str, seconds: str) -> None:
    """Sleep once in a phase, from a step on."""
    if phase == "preparing":
        pause_preparing(float(seconds))
        return
    from inheritune_ds.distributed.watchdog import Watchdog

    own = Watchdog.phase

    @contextmanager
    def pausing(watch: Watchdog, name: str, at: int) -> Iterator[None]:
        with own(watch, name, at):
            if name == phase and at >= int(step):
                sleep_once(float(seconds))
            yield

    patch.object(Watchdog, "phase", pausing).start()


def pause_preparing(seconds: float) -> None:
    """Sleep in rank 0's preparation, while the others wait for it."""
    from inheritune_ds.distributed.coordination import Coordinator
    from inheritune_ds.run.pins import pin_revisions

    run_on_rank0, calls = Coordinator.run_on_rank0, count(1)

    def preparing(*words: Any, **how: Any) -> Any:
        sleep_once(seconds)
        return pin_revisions(*words, **how)

    def waiting_for_rank_0(coordinator: Coordinator, work: Callable[[], Any]) -> Any:
        if next(calls) == 2 and os.environ.get("RANK", "0") != "0":  # the first asks whether the run has finished
            sleep_once(0.0)
        return run_on_rank0(coordinator, work)

    patch("inheritune_ds.run.prepare.pin_revisions", preparing).start()
    patch.object(Coordinator, "run_on_rank0", waiting_for_rank_0).start()


def sleep_for_ever() -> None:
    """Hang; the campaign looks for this name in the stacks."""
    time.sleep(3600)


def hold_the_interpreter() -> None:
    """Sleep in C code without letting another thread run."""
    ctypes.PyDLL(None).sleep(3600)


def hang(place: str, rank: str) -> None:
    """Let a function sleep on one rank, once the loop has done some steps."""
    if os.environ.get("RANK", "0") != rank:
        return
    import torch
    import torch.distributed as dist
    import wandb

    from inheritune_ds.checkpoints.saver import Saver
    from inheritune_ds.data.stream.batches import BatchStream
    from inheritune_ds.run import stages
    from inheritune_ds.training.engine import Engine
    from inheritune_ds.training.requests import Controls

    places: dict[str, tuple[Any, str, int]] = {
        "start": (Engine, "__init__", 0),
        "first_step": (Engine, "train_step", 0),
        "forward": (torch.nn.Embedding, "forward", STEPS_BEFORE),
        "interpreter": (torch.nn.Embedding, "forward", STEPS_BEFORE),
        "data": (BatchStream, "micro_batches", STEPS_BEFORE),
        "collective": (dist, "all_reduce", STEPS_BEFORE),
        "wandb": (wandb.Run, "log", STEPS_BEFORE),
        "wandb_finish": (wandb.Run, "finish", 0),
        "validation": (Engine, "window_losses", STEPS_BEFORE),
        "save": (Saver, "save", STEPS_BEFORE),
        "finish": (stages, "write_results", 0),
    }
    owner, name, after_steps = places[place]
    own, stepped, steps = getattr(owner, name), Controls.stepped, [0]

    def counting(controls: Controls, seconds: float) -> None:
        steps[0] += 1
        stepped(controls, seconds)

    def hanging(*words: Any, **how: Any) -> Any:
        if steps[0] >= after_steps:
            Path("hung").write_text(repr(time.time()), encoding="utf-8")
            (hold_the_interpreter if place == "interpreter" else sleep_for_ever)()
        return own(*words, **how)

    patch.object(Controls, "stepped", counting).start()
    patch.object(owner, name, hanging).start()


def spoil(bad: str, first: str, end: str) -> None:
    """Let batches spoil the loss of the last rank."""
    import numpy as np
    import torch

    from inheritune_ds.data.stream.batches import BatchStream
    from inheritune_ds.training.engine import Engine

    own_batches, own_init = BatchStream.micro_batches, Engine.__init__

    def micro_batches(stream: BatchStream, number: int, *, rank: int, world_size: int, **how: Any) -> Iterator[Any]:
        if number >= int(first):
            number += int(end) - int(first)
        is_bad = number >= int(bad[:-1]) if bad.endswith("+") else str(number) in bad.split(",")
        for place, batch in enumerate(own_batches(stream, number, rank=rank, world_size=world_size, **how)):
            own = np.where(batch == MARKED, MARKED - 1, batch)
            if place == 0 and rank == world_size - 1 and is_bad:
                own[0, 3] = MARKED
            yield own

    def init(engine: Engine, *given: Any, **named: Any) -> None:
        own_init(engine, *given, **named)
        embedding: Any = engine.module.get_input_embeddings()  # type: ignore[operator]
        embedding.register_forward_hook(
            lambda _module, ids, output: (
                torch.where((ids[0] == MARKED).unsqueeze(-1), torch.nan, output) if engine.module.training else None
            )
        )

    patch.object(BatchStream, "micro_batches", micro_batches).start()
    patch.object(Engine, "__init__", init).start()


def secret(_: str) -> None:
    """Let training fail with secrets in its message."""

    def broken(*_args: Any, **_more: Any) -> None:
        raise RuntimeError(f"cannot log in with {os.environ['HF_TOKEN']} at {os.environ['HTTPS_PROXY']}")

    patch("inheritune_ds.run.execute.train", broken).start()


def main() -> int:
    """Run train.py."""
    from inheritune_ds.distributed.environment import prepare_environment

    prepare_environment(os.environ, kind="cpu")  # before torch is imported, as the program itself does
    kind, *words = os.environ["TROUBLE"].split(":")
    troubles: dict[str, Callable[..., None]] = {"pause": pause, "hang": hang, "spoil": spoil, "secret": secret}
    troubles[kind](*words)
    from inheritune_ds.cli import main as train

    return train(["train", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
