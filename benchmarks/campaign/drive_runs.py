"""Launched by the campaign: real runs, one after the other, in one process group.

`drive_runs.py RECIPE DS_CONFIG FOLDER OUT STEP [STEP ...] [--from NAME] [--then DS_CONFIG]`, under torchrun. For each
step it makes the run folder FOLDER/runs/OUT-STEP as FOLDER/runs/NAME was after that step (0: none),
resumes it to the end, under the other config if given, and each rank writes its observations to
FOLDER/OUT.rankN.json.
"""

import argparse
import gc
import hashlib
import os
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


def main() -> None:
    """Train the runs of the command line."""
    parser = argparse.ArgumentParser()
    for word in ("recipe", "ds_config", "folder", "out"):
        parser.add_argument(word, type=Path)
    parser.add_argument("steps", nargs="+", type=int)
    parser.add_argument("--from", dest="first")
    parser.add_argument("--then", type=Path)
    args = parser.parse_args()
    world = detect(os.environ)
    log_to_console(is_main=world.is_main)
    export(world, os.environ)
    prepare_environment(os.environ, kind="cpu")
    import torch

    from inheritune_ds.distributed.coordination import Coordinator
    from inheritune_ds.distributed.process_group import leave_process_group
    from inheritune_ds.run.execute import execute
    from inheritune_ds.run.launch import Launch

    runs = args.folder / "runs"
    machine, stop = machine_for(None, world.local_size), StopSignal()
    meeting = Coordinator(world, stop)

    def launched(ds_config: Path) -> Launch:
        document = deepspeed_checks.read(ds_config)
        # One coordinator for all launches: two of one process would take each other's notes for theirs.
        return Launch(document, str(ds_config), machine, world, stop, meeting, runs, args.folder / "cache")

    recipe = load_recipe(str(args.recipe))
    seen: dict[int, Seen] = {}
    for step in args.steps:
        name = f"{args.out}-{step}"
        if step:
            meeting.run_on_rank0(partial(stopped_after, runs / args.first, runs / name, step))
        # DeepSpeed collects garbage a few times while it builds an engine, most of which was imported.
        gc.freeze()
        # The figures take longer than the training, and are drawn of the rows that are compared.
        with recorded_windows() as windows, patch("inheritune_ds.run.finish.write_run_report", lambda run: run):
            ds_config = args.then if step and args.then else args.ds_config
            named, launch = recipe.model_copy(update={"name": name}), launched(ds_config)
            assert execute(named, launch.resolve(named), launch)
        seen[step] = {"rng": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(), "windows": windows}
    write_json(args.folder / f"{args.out}.rank{world.rank}.json", seen)
    leave_process_group()


if __name__ == "__main__":
    main()
