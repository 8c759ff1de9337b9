"""Launched by the campaign: train.py's own main, on one of whose ranks something sleeps for ever.

`HANG=PLACE:RANK drive_hangs.py ARGUMENTS`, with the arguments of train.py, in the folder where the file `hung` is
written when the sleep begins. Places inside the loop sleep from the sixth step on, which a checkpoint precedes.
"""

import ctypes
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

STEPS_BEFORE = 5
Sleep = Callable[..., Any]


def sleep_for_ever(*_: Any, **__: Any) -> None:
    """Hang; the test looks for this name in the stacks."""
    Path("hung").write_text(repr(time.time()), encoding="utf-8")
    time.sleep(3600)


def hold_the_interpreter(*_: Any, **__: Any) -> None:
    """Sleep in C code without letting another thread run."""
    Path("hung").write_text(repr(time.time()), encoding="utf-8")
    ctypes.PyDLL(None).sleep(3600)


def replaced(owner: Any, name: str, sleep: Sleep = sleep_for_ever, *, after_steps: int = 0) -> None:
    """Let a function of a class or module sleep, once the loop has done some steps."""
    from inheritune_ds.training.requests import Controls

    own, stepped, steps = getattr(owner, name), Controls.stepped, [0]

    def counting(controls: Controls, seconds: float) -> None:
        steps[0] += 1
        stepped(controls, seconds)

    def hanging(*words: Any, **how: Any) -> Any:
        if steps[0] >= after_steps:
            sleep()
        return own(*words, **how)

    patch.object(Controls, "stepped", counting).start()
    patch.object(owner, name, hanging).start()


def hang(place: str) -> None:
    """Prepare the sleep; the modules are imported as late as the program itself does."""
    from inheritune_ds.distributed.environment import prepare_environment

    prepare_environment(os.environ, kind="cpu")
    import torch
    import torch.distributed as dist
    import wandb

    from inheritune_ds.checkpoints.saver import Saver
    from inheritune_ds.data.stream.batches import BatchStream
    from inheritune_ds.run import stages
    from inheritune_ds.training.engine import Engine

    owner, name, after_steps = {
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
    }[place]
    sleep = hold_the_interpreter if place == "interpreter" else sleep_for_ever
    replaced(owner, name, sleep, after_steps=after_steps)


def main() -> int:
    """Run train.py."""
    place, _, rank = os.environ["HANG"].partition(":")
    if os.environ.get("RANK", "0") == rank:
        hang(place)
    from inheritune_ds.cli import main as train

    return train(["train", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
