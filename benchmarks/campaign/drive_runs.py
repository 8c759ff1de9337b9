"""Launched by the campaign: real runs, one after the other, in one process group.

`drive_runs.py FOLDER ARGUMENTS`, under torchrun, with the arguments of `resumes.launch` as JSON. For each of `steps` it
makes the run folder FOLDER/runs/OUT-STEP as FOLDER/runs/FIRST was after that step (0: none), resumes it to the end
under the config `then`, and each rank writes its observations to FOLDER/OUT.rankN.json.
"""

import gc
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from benchmarks.campaign.resumes import Seen, stopped_after
from inheritune_ds.cli.options import machine_for
from inheritune_ds.config import deepspeed_checks
from inheritune_ds.config.loading import load_recipe
from inheritune_ds.console import log_to_console
from inheritune_ds.data.stream.batches import BatchStream
from inheritune_ds.distributed.environment import prepare_environment
from inheritune_ds.distributed.signals import StopSignal
from inheritune_ds.distributed.world import detect, export
from inheritune_ds.storage.files import write_json

Windows = dict[int, list[list[str]]]


@contextmanager
def recorded_windows() -> Iterator[Windows]:
    """Note which windows this rank reads: by step, its micro-batches, each window as a sha256 of its tokens."""
    read: Windows = {}
    own = BatchStream.micro_batches

    def recording(stream: BatchStream, step: int, **how: Any) -> Iterator[NDArray[np.int64]]:
        batches = list(own(stream, step, **how))
        read[step] = [[hashlib.sha256(window.tobytes()).hexdigest() for window in batch] for batch in batches]
        return iter(batches)

    with patch.object(BatchStream, "micro_batches", recording):
        yield read


def main(folder: Path, recipe: str, ds_config: str, out: str, steps: list[int], first: str, then: str) -> None:  # noqa: PLR0913, PLR0917
    """Train the runs: the arguments are those of `resumes.launch`."""
    world = detect(os.environ)
    log_to_console(is_main=world.is_main)
    export(world, os.environ)
    prepare_environment(os.environ, kind="cpu")
    import torch

    from inheritune_ds.distributed.coordination import Coordinator
    from inheritune_ds.distributed.process_group import end_rank
    from inheritune_ds.run.execute import execute
    from inheritune_ds.run.launch import Launch

    runs = folder / "runs"
    machine, stop = machine_for(None, world.local_size), StopSignal()
    meeting = Coordinator(world, stop)

    def launched(config: str) -> Launch:
        document = deepspeed_checks.read(Path(config))
        # One coordinator for all launches: two of one process would take each other's notes for theirs.
        return Launch(document, config, machine, world, stop, meeting, runs, folder / "cache")

    loaded = load_recipe(recipe)
    seen: dict[int, Seen] = {}
    for step in steps:
        name = f"{out}-{step}"
        if step:
            meeting.run_on_rank0(partial(stopped_after, runs / first, runs / name, step))
        # DeepSpeed collects garbage a few times while it builds an engine, most of which was imported.
        gc.freeze()
        # The figures take longer than the training, and are drawn of the rows that are compared.
        with recorded_windows() as windows, patch("inheritune_ds.run.finish.write_run_report", lambda run: run):
            named, launch = loaded.model_copy(update={"name": name}), launched(then if step else ds_config)
            assert execute(named, launch.resolve(named), launch)
        seen[step] = {"rng": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(), "windows": windows}
    write_json(folder / f"{out}.rank{world.rank}.json", seen)
    end_rank()


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
