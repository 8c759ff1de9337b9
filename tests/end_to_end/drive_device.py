"""Launched by tests: train.py with stand-ins for torch's GPUs, up to the run itself, once for each case.

Arguments: a file of cases as JSON, the file of the results, and the arguments of train.py. A case has `environ`, and
`cards` in CUDA's order: name, GiB, capability. A result is what the run would get.
"""

import contextlib
import io
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from inheritune_ds.cli import main
from inheritune_ds.config.deepspeed import Resolved
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.plan import machine
from inheritune_ds.run import execute as execution
from inheritune_ds.run.launch import Launch

started: list[dict[str, Any]] = []


def see(cards: list[tuple[str, float, tuple[int, int]]]) -> None:
    """Make torch see these cards."""
    properties = [
        SimpleNamespace(name=name, major=capability[0], minor=capability[1], uuid=f"uuid-{name}")
        for name, _, capability in cards
    ]
    torch.cuda.__dict__.update(
        is_available=lambda: bool(cards),
        device_count=lambda: len(cards),
        set_device=lambda _: None,
        get_device_properties=lambda index: properties[index],
        mem_get_info=lambda index: (int((cards[index][1] - 0.4) * 2**30), int(cards[index][1] * 2**30)),
    )


def start(_recipe: Recipe, resolved: Resolved, launch: Launch, **_: object) -> bool:
    """Note what the run would start with."""
    started.append(
        {
            "machine": asdict(launch.machine),
            "precision": resolved.precision,
            "micro_batch_size": resolved.micro_batch_size,
            "allocator": os.environ.get("PYTORCH_ALLOC_CONF"),
            "accelerator": os.environ.get("DS_ACCELERATOR"),
        }
    )
    return True


def play(case: dict[str, Any], arguments: list[str]) -> dict[str, Any]:
    """Run the command in the environment of a case; its exit code, output, and what the run would get."""
    before = dict(os.environ)
    os.environ.pop("DS_ACCELERATOR", None)
    os.environ.update(case["environ"])
    see(case["cards"])
    started.clear()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = main(["train", *arguments])
    os.environ.clear()
    os.environ.update(before)
    return {"code": code, "printed": printed.getvalue(), **(started[0] if started else {})}


if __name__ == "__main__":
    execution.__dict__["execute"] = start
    machine.__dict__["DRIVER"] = (Path("/dev/null"),)  # the driver is loaded
    torch.version.__dict__["cuda"] = "13.0"
    cases, results, *words = sys.argv[1:]
    Path(results).write_text(json.dumps([play(case, words) for case in json.loads(Path(cases).read_text())]))
