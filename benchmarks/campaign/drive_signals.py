"""Launched by the campaign: train.py's own main, which sleeps in one phase, so that a signal arrives there.

`PAUSE=PHASE:STEP:SECONDS drive_signals.py ARGUMENTS`, with the arguments of train.py. Every rank writes its process id
to `paused-RANK` in its folder when it sleeps. `preparing` is rank 0's work before training, while other ranks wait.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch


def pause(seconds: float) -> None:
    """Write the process id of this rank, then sleep."""
    path = Path(f"paused-{os.environ.get('RANK', '0')}")
    if not path.exists():
        path.with_suffix(".tmp").write_text(str(os.getpid()), encoding="utf-8")
        path.with_suffix(".tmp").rename(path)
        time.sleep(seconds)


def pause_in(phase: str, step: int, seconds: float) -> None:
    """Sleep once in a phase, from a step on."""
    from inheritune_ds.distributed.watchdog import Watchdog

    own = Watchdog.phase

    @contextmanager
    def pausing(watch: Watchdog, name: str, at: int) -> Iterator[None]:
        with own(watch, name, at):
            if name == phase and at >= step:
                pause(seconds)
            yield

    patch.object(Watchdog, "phase", pausing).start()


def pause_preparing(seconds: float) -> None:
    """Sleep in rank 0's preparation, while the others wait for it."""
    from inheritune_ds.distributed.environment import prepare_environment

    prepare_environment(os.environ, kind="cpu")
    from inheritune_ds.distributed.coordination import Coordinator
    from inheritune_ds.run.pins import pin_revisions

    run_on_rank0, calls = Coordinator.run_on_rank0, count(1)

    def preparing(*words: Any, **how: Any) -> Any:
        pause(seconds)
        return pin_revisions(*words, **how)

    def waiting_for_rank_0(coordinator: Coordinator, work: Callable[[], Any]) -> Any:
        if next(calls) == 2 and os.environ.get("RANK", "0") != "0":  # the first asks whether the run has finished
            pause(0.0)
        return run_on_rank0(coordinator, work)

    patch("inheritune_ds.run.prepare.pin_revisions", preparing).start()
    patch.object(Coordinator, "run_on_rank0", waiting_for_rank_0).start()


def main() -> int:
    """Run train.py."""
    phase, step, seconds = os.environ["PAUSE"].split(":")
    if phase == "preparing":
        pause_preparing(float(seconds))
    else:
        pause_in(phase, int(step), float(seconds))
    from inheritune_ds.cli import main as train

    return train(["train", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
