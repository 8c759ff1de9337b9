"""Options that several verbs share."""

import argparse
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inheritune_ds.errors import InherituneError, MachineError, RecipeError

if TYPE_CHECKING:
    from inheritune_ds.config.deepspeed import Machine
    from inheritune_ds.config.recipe import Recipe


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """Add the options for recipe, DeepSpeed config, GPU and folders."""
    parser.add_argument("--recipe", help="a shipped name or a YAML file (default: openllama-3b-13l)")
    parser.add_argument(
        "--deepspeed",
        nargs="?",
        const=True,
        metavar="JSON",
        help="DeepSpeed config, as --deepspeed_config; ignored without a value",
    )
    parser.add_argument(
        "--deepspeed_config",
        "--deepspeed-config",
        metavar="JSON",
        help="how this machine runs the recipe, such as ds_configs/a6000.json (default: everything auto)",
    )
    parser.add_argument("--gpu", help="plan and report hours for this GPU (a6000, h100, ...); a run uses what is here")
    add_folders(parser)
    parser.epilog = "Any other argument key.path=value overrides the recipe, e.g. 'training.duration=200 steps'."


def add_folders(parser: argparse.ArgumentParser) -> None:
    """Add the options for the folders of runs and of token files."""
    add_runs_dir(parser)
    parser.add_argument("--cache-dir", type=Path, default=Path("cache"), help="token files (default: cache)")


def add_runs_dir(parser: argparse.ArgumentParser) -> None:
    """Add the option for the folder of runs."""
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="folder of run folders (default: runs)")


def refuse_below_one(option: str, value: int | None) -> None:
    """Refuse a count below 1; None is an option that is not set."""
    if value is not None and value < 1:
        raise RecipeError(f"{option} {value} is not accepted", allowed="1, 2, 3, ...", action=f"change {option}")


def read_experiment(args: argparse.Namespace, overrides: list[str]) -> "tuple[Recipe, dict[str, Any], str]":
    """Load recipe and DeepSpeed JSON, which also gets its name in messages; one error lists the problems of both."""
    from inheritune_ds.config import deepspeed_checks
    from inheritune_ds.config.loading import DEFAULT_RECIPE, load_recipe

    overrides = list(overrides)
    switch = args.deepspeed if isinstance(args.deepspeed, str) else None
    if switch and "=" in switch:  # `--deepspeed key=value`: the switch takes no value here, but an override follows it
        overrides.append(switch)
        switch = None
    named = switch if args.deepspeed_config is None else args.deepspeed_config
    path = None if named is None else Path(named)
    origin = "DeepSpeed config" if named is None else str(path)
    problems: list[InherituneError] = []
    document: dict[str, Any] = {}
    if switch is not None and switch != named:
        text = f"--deepspeed names {switch}, --deepspeed_config names {named}"
        problems.append(RecipeError(text, allowed="one of them", action="remove the other"))
    try:
        document = deepspeed_checks.read(path)
    except InherituneError as error:
        problems.append(error)
    try:
        recipe = load_recipe(DEFAULT_RECIPE if args.recipe is None else args.recipe, overrides)
    except InherituneError as error:
        raise RecipeError.of([error, *problems, *deepspeed_checks.problems(document, origin)]) from None
    if problems:
        raise RecipeError.of(problems)
    return recipe, document, origin


def planned_gpu(gpu_name: str | None) -> tuple[str | None, list[str]]:
    """The GPU to plan for (None: the one here), and a note if it is the default for a machine without a GPU."""
    from inheritune_ds.plan.machine import detect_gpus

    if gpu_name is not None or detect_gpus():
        return gpu_name, []
    return "a6000", ["no GPU on this machine: planned for an a6000; name another with --gpu"]


def machine_for(gpu_name: str | None, local_size: int) -> "Machine":
    """The hardware of one rank, for a plan: the named GPU, the least GPU of the ranks here, or a share of this CPU."""
    from inheritune_ds.config.deepspeed import Machine
    from inheritune_ds.plan.gpus import gpu
    from inheritune_ds.plan.machine import cpu_machine, detect_gpus, has_driver

    accelerator = os.environ.get("DS_ACCELERATOR")
    if accelerator not in (None, "cpu", "cuda"):
        raise MachineError(
            f"the environment variable DS_ACCELERATOR is {accelerator!r}",
            allowed="cpu, cuda, or no such variable: a GPU if there is one",
            action="unset DS_ACCELERATOR, or set it to cpu to run on the CPU",
        )
    if gpu_name is not None:
        return Machine("cuda", gpu(gpu_name).memory_gib, bf16=True)  # every GPU of the table has bf16
    found = [] if accelerator == "cpu" else detect_gpus()[:local_size]
    if accelerator == "cuda" and not found and not has_driver():
        raise MachineError(
            "the environment variable DS_ACCELERATOR is cuda, but this machine has no GPU",
            action="unset DS_ACCELERATOR to run on the CPU, or start the run on a machine with a GPU",
        )
    if found:
        return Machine("cuda", min(device.free_gib for device in found), all(device.bf16 for device in found))
    return cpu_machine(local_size)


def expected_machine(local_size: int) -> "Machine":
    """What the checks before the import of torch assume: this CPU, or the best GPU where torch may see one."""
    from inheritune_ds.config.deepspeed import Machine
    from inheritune_ds.plan.machine import has_driver

    machine = machine_for(None, local_size)
    unsure = machine.kind == "cuda" or (os.environ.get("DS_ACCELERATOR") != "cpu" and has_driver())
    return Machine("cuda", math.inf, bf16=True) if unsure else machine
