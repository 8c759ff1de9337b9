"""The command line that benchmarks share, and the context of their figures: command, date, versions, machine."""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from inheritune_ds import __version__
from inheritune_ds.plan.machine import detect_gpus, host_memory_gib
from inheritune_ds.storage.files import write_json

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "docs" / "results"
PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "numpy")


def environment() -> dict[str, Any]:
    """Everything that a reader needs to judge or repeat a figure; nothing of the user's environment."""
    return {
        "command": " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "packages": {"inheritune_ds": __version__, **{name: metadata.version(name) for name in PACKAGES}},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(host_memory_gib(), 1),
        "gpus": [f"{gpu.name}, {gpu.memory_gib:.0f} GiB" for gpu in detect_gpus()],
    }


def command_line(name: str, doc: str | None, *, rehearse: str | None = None) -> argparse.ArgumentParser:
    """The parser of `python -m benchmarks.NAME`, with --out, and with --rehearse if that is described."""
    about = doc.splitlines()[0] if doc else None
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about)
    parser.set_defaults(name=name, rehearse=False)
    if rehearse:
        parser.add_argument("--rehearse", action="store_true", help=rehearse)
    usual = f"docs/results/{name}.json" + ("; of a rehearsal: a temporary file" if rehearse else "")
    parser.add_argument("--out", type=Path, help=f"JSON file (default: {usual})")
    return parser


def record(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Write the figures of a command that `command_line` has parsed."""
    folder = Path(tempfile.mkdtemp()) if args.rehearse and not args.out else RESULTS
    write_result(args.out or folder / f"{args.name}.json", figures)


def write_result(path: Path, figures: dict[str, Any]) -> None:
    """Write figures and environment as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"environment": environment(), **figures})
    print(f"written: {os.path.relpath(path)}")


def git(*words: str) -> str | None:
    """Output of a git command in this repository; None outside a checkout."""
    try:
        done = subprocess.run(["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
