"""The unattended check for a machine with a GPU: every question of this repository that only a GPU can answer.

`python -m benchmarks.gpu` goes through the parts below, the most valuable first. Each runs in a process of its own for
at most `--minutes`, so that one that crashes, hangs or runs out of memory harms no other. It ends with 0 when every
part met its bars (a part that has nothing to run with is skipped, a missing optional kernel gives a line), 1 when one
missed a bar or failed, 10 where there is no GPU. `--rehearse` goes through all of it at toy size on a CPU: that tests
this command.

docs/results/gpu-<part>-<date>.json is written when a part starts and after each of its cases, atomically. If a part or
this command is killed, the file holds the finished cases, and under `missing` the others. `--list` has the minutes that
each part is expected to take: where a command may run for ten minutes, give `--only` parts of nine minutes together.

No network is needed. On a machine without one, install from a folder of wheels (`pip download -d wheels ...` on another
one): `python -m pip install --no-index --find-links wheels inheritune_ds`, for the optional kernels `flash-attn` and
`liger-kernel`, too; then start the command in a checkout. Nothing but the package's own requirements has to be there.
"""

import argparse
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.part import Part
from benchmarks.gpu_parts.report import FAILED, MISSED, RUNNING, Report, bar_words
from benchmarks.gpu_parts.watchdog import Ending, Start, watch
from benchmarks.record import RESULTS, environment
from inheritune_ds.errors import InherituneError, MachineError
from inheritune_ds.plan.machine import detect_gpus
from inheritune_ds.storage.files import read_json, write_json

DEFAULT_MINUTES = 8.0
START_S, COMPILE_S = 20.0, 45.0
"""Expected seconds of a part's imports and probes, and of compiling blocks and loss once; not measured yet."""


@dataclass(frozen=True)
class Entry:
    """A part: its module and function, a line about it, its expected length, and its lane.

    Attributes:
        cases: Cases that it announces, at most.
        case_s: Expected seconds of a case besides compilation: process, warm-up, measurement.
        compiled: Times that it compiles blocks and loss: once for each case with shapes or kernels of its own.
        lane: In a rehearsal the parts of a lane share a process, and the lanes run side by side.
    """

    where: str
    about: str
    cases: int
    case_s: float
    compiled: int = 0
    lane: int = 0

    @property
    def expected_s(self) -> float:
        """Expected seconds; a part must stay well below the default of `--minutes`."""
        return START_S + self.cases * self.case_s + self.compiled * COMPILE_S


PARTS = {
    "device": Entry("device:facts", "the driver's facts about the GPU against torch's", 1, 5),
    "parity-llama": Entry("parity:llama", "gradients of every kernel that works here, against fp64: LLaMA", 24, 4, 2),
    "mfu-1.8b": Entry("throughput:mfu_target", "MFU, tokens/s and memory of the 13-block target", 3, 70, 3),
    "a6000": Entry("capped:shipped", "ds_configs/a6000.json as it stands, with 46 GiB", 1, 60, 1),
    "fp32": Entry("export:fp32", "a compiled fp32 run up to its checked export", 1, 60, 1, lane=1),
    "packing-llama": Entry("packing:llama", "documents kept apart: errors against each alone, cost; LLaMA", 4, 20, 4),
    "head-100": Entry("packing:head_100", "memory of documents kept apart with a head size of 100", 1, 30),
    "planner-llama": Entry("predictions:llama", "memory and speed of the 13-block target against the plan", 4, 50, 4),
    "mfu-medium": Entry("throughput:mfu_medium", "MFU of GPT-2 medium-16 at 1024 tokens", 2, 60, 2),
    "mfu-large": Entry("throughput:mfu_large", "MFU of GPT-2 large-18 at 1024 tokens", 2, 80, 2),
    "engine-tax": Entry("ratios:tax", "the step against that of a plain loop with the same kernels", 3, 70, 2),
    "trainer": Entry("ratios:trainer", "the program as shipped over Hugging Face's Trainer with DeepSpeed", 3, 70, 1),
    "a6000-fit": Entry("capped:fit", "micro-batches that fit into 46 GiB, by type of the gradient sums", 8, 25, 4),
    "planner-gpt2": Entry("predictions:gpt2", "memory and speed of the GPT-2 targets against the plan", 3, 50, 2),
    "resume": Entry("resume:resume", "train, kill, resume, compare", 3, 60, lane=1),
    "bit-equal": Entry("deterministic:deterministic", "the same with deterministic kernels", 3, 60, lane=1),
    "parity-gpt2": Entry("parity:gpt2", "gradients of every kernel that works here, against fp64: GPT-2", 24, 4, 2),
    "packing-gpt2": Entry("packing:gpt2", "documents kept apart: errors against each alone, cost; GPT-2", 4, 20, 4),
    "peers": Entry("ratios:nanogpt", "nanoGPT from a checkout (--nanogpt)", 3, 70, 2),
    "loss": Entry("head_loss:head_loss", "time and memory of the chunked, Liger's and the plain loss", 4, 10, 1),
    "optimizers": Entry("optimizers:optimizers", "error and time of every AdamW that works here", 4, 40),
    "startup": Entry("startup:startup", "launch to first step: eager, compiled cold, compiled again", 4, 45, 1, lane=1),
}
REHEARSAL_ENVIRON = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "TORCH_COMPILE_OVERRIDE_BACKENDS": ">=0:aot_eager",
    "OMP_NUM_THREADS": "1",
}
"""No GPU is looked at. Graphs are captured and differentiated, so that a break is found, but no code is generated: that
would take longer than all the rest. A toy needs no second thread."""
ENVIRON = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE"}
_TO_SPARE_S = 10.0
"""A part's own deadline is this long before the watchdog's."""
_LOG_END = 3000
_STATE = ("name", "driver_version", "memory.used", "power.limit", "clocks.max.sm", "clocks.sm", "temperature.gpu")


def names(text: str) -> list[str]:
    """Read `parity,loss`: parts, in the order of PARTS."""
    given = text.split(",")
    unknown = [name for name in given if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return [name for name in PARTS if name in given]


def minutes(text: str) -> float:
    """Read a number of minutes above 0."""
    try:
        given = float(text)
    except ValueError:
        given = 0.0
    if not 0.0 < given < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--only", type=names, metavar="NAME,...", default=list(PARTS), help=f"any of {', '.join(PARTS)}")
    add("--rehearse", action="store_true", help="every part at toy size on the CPU: it tests this command")
    add("--nanogpt", type=Path, metavar="FOLDER", help="a nanoGPT checkout, for the part peers")
    add(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="of the JSON files (default: docs/results; a rehearsal's: temporary)",
    )
    add("--minutes", type=minutes, default=DEFAULT_MINUTES, help="time limit of a part (default: 8)")
    add("--list", action="store_true", help="print the parts and leave")
    add("--part", type=names, help=argparse.SUPPRESS)  # the process of one part (in a rehearsal, of several)
    add("--json", type=Path, help=argparse.SUPPRESS)  # folder of its results
    add("--date", help=argparse.SUPPRESS)  # in their names
    args = parser.parse_args(arguments)
    if args.list:
        for name, entry in PARTS.items():
            print(f"{name:<15}{entry.expected_s / 60.0:>4.1f} min  {entry.about}")
        return 0
    try:
        if args.part:
            return run_here(args)
        check_machine(args)
        return run_all(args)
    except InherituneError as error:
        print(f"gpu: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def check_machine(args: argparse.Namespace) -> None:
    """Refuse a machine or checkout that no part can use.

    Raises:
        MachineError: Without a GPU, or if --nanogpt is no checkout.
    """
    if not args.rehearse and not detect_gpus():
        raise MachineError(
            "nvidia-smi reports no GPU: nothing was checked",
            allowed="a machine with an NVIDIA GPU",
            action="give --rehearse to go through all of it on the CPU at toy size",
        )
    if args.nanogpt is not None and not (args.nanogpt / "model.py").is_file():
        raise MachineError(
            f"--nanogpt {args.nanogpt} has no model.py",
            allowed="the folder of a nanoGPT checkout",
            action="git clone https://github.com/karpathy/nanoGPT, or leave --nanogpt out",
        )


def run_all(args: argparse.Namespace) -> int:
    """Run every part in a process of its own, write each result, print the table."""
    out = args.out or (Path(tempfile.mkdtemp()) if args.rehearse else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    args.json, args.date = out.resolve(), f"{datetime.now(UTC):%Y-%m-%d}"
    found: dict[str, dict[str, Any]] = {}
    waves = [[[name]] for name in args.only]
    if args.rehearse:
        apart = [[name for name in args.only if PARTS[name].lane == lane] for lane in (0, 1)]
        waves = [[group for group in apart if group]]
    for wave in waves:
        names_here = [name for group in wave for name in group]
        head = {"environment": environment(), "rehearsal": args.rehearse, "gpu": gpu_state()}
        for name in names_here:
            write_json(result_path(args, name), {**head, "part": name, "status": RUNNING, "missing": ["all"]})
        print(f"{datetime.now(UTC):%H:%M:%S} {', '.join(names_here)}", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            starts = [_start(args, group, Path(scratch)) for group in wave]
            for group, start, ending in zip(wave, starts, watch(starts), strict=True):
                found |= {name: outcome(result_path(args, name), start.log, ending) for name in group}
        for name in names_here:
            write_json(result_path(args, name), found[name])
            print(*table({name: found[name]}), f"    {os.path.relpath(result_path(args, name))}", sep="\n", flush=True)
    print("", *table(found, bars=False), sep="\n", flush=True)
    return int(any(one["status"] in (MISSED, FAILED) for one in found.values()))


def result_path(args: argparse.Namespace, name: str) -> Path:
    """The JSON file of a part."""
    return Path(args.json) / f"gpu-{name}-{args.date}.json"


def gpu_state() -> list[dict[str, str]]:
    """The driver's report on each GPU: name, driver, memory in use, clocks, power; empty without one."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_STATE)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20.0, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = answer.stdout.splitlines()
    return [dict(zip(_STATE, (word.strip() for word in line.split(",")), strict=False)) for line in lines]


def _start(args: argparse.Namespace, group: Sequence[str], scratch: Path) -> Start:
    """The process of some parts."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", ",".join(group), "--json", str(args.json)]
    command += ["--date", args.date, "--minutes", str(args.minutes)]
    command += ["--rehearse"] if args.rehearse else []
    command += ["--nanogpt", str(args.nanogpt.resolve())] if args.nanogpt is not None else []
    environ = {**ENVIRON, **(REHEARSAL_ENVIRON if args.rehearse else {})}
    return Start(command, environ, scratch / f"{group[0]}.log", 60.0 * args.minutes * len(group))


def run_here(args: argparse.Namespace) -> int:
    """Run parts in this process; their results are files of the folder --json."""
    for name in args.part:
        report = Report(result_path(args, name), rehearsal=args.rehearse)
        module, _, function = PARTS[name].where.partition(":")
        start_s = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            deadline_s = start_s + 60.0 * args.minutes - _TO_SPARE_S
            part = Part(args.rehearse, args.nanogpt, Path(folder), deadline_s, report)
            try:
                if not args.rehearse:
                    _check_torch()
                getattr(importlib.import_module(f"benchmarks.gpu_parts.{module}"), function)(part)
            except InherituneError as error:
                report.fail(str(error))
            except Exception as error:  # noqa: BLE001 - a part that fails must not end the others
                traceback.print_exc()
                report.fail(f"{type(error).__name__}: {error}")
        report.figure("seconds", round(time.monotonic() - start_s, 1))
        report.end()
    return 0


def _check_torch() -> None:
    from inheritune_ds.distributed.world import World
    from inheritune_ds.training.toolchain import check_device

    check_device("cuda", World(0, 1, 0, 1, "single"), offload=False)


def outcome(path: Path, log: Path, ending: Ending) -> dict[str, Any]:
    """Findings of a part from its file, also if its process was killed."""
    found: dict[str, Any] = {"bars": {}, "lines": [], "figures": {}, **read_json(path)}
    if found["status"] == RUNNING:
        found |= {"status": FAILED, "reason": ending.words}
    if found["status"] == FAILED:
        found["log_end"] = log.read_text(encoding="utf-8", errors="replace")[-_LOG_END:]
    return {**found, "seconds": found["figures"].pop("seconds", round(ending.seconds, 1))}


def table(found: Mapping[str, Mapping[str, Any]], *, bars: bool = True) -> list[str]:
    """The parts in lines: state, seconds, why; below each its bars and lines, if they are wanted."""
    lines = []
    for name, one in found.items():
        reason = str(one["reason"]).strip().partition("\n")[0]
        first = reason or "; ".join(bar_words(bar, one["bars"][bar]) for bar in list(one["bars"])[:1])
        lines.append(f"{name:<15}{one['status']:<9}{one['seconds']:>7.1f} s  {first}".rstrip())
        if bars:
            lines += [f"    {bar_words(bar, value)}" for bar, value in one["bars"].items()]
            lines += [f"    {line}" for line in one["lines"]]
            lines += [f"    missing: {', '.join(one['missing'])}"] if one["missing"] else []
    return lines


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also ends the started processes
    sys.exit(main())
