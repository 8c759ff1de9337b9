"""Start-up times: import, --help, --dry-run, and from launch to the end of the first step.

`python -m benchmarks.startup` writes docs/results/startup.json. Page cache, token files and DeepSpeed's compiled
ops are warm: one start of each kind is made before the measured ones. Run it on an idle machine.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.launch import RECIPE, training_on_cpu
from benchmarks.record import REPOSITORY, command_line, record
from inheritune_ds.tracking.metrics import read_metrics

LAUNCH_TIMEOUT_S = 300.0
COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "import": [sys.executable, "-c", "import inheritune_ds"],
    "help": [str(Path(sys.executable).with_name("inheritune-ds")), "--help"],
    "dry_run": [sys.executable, "train.py", "--deepspeed_config", "ds_configs/a6000.json", "--dry-run"],
}


def time_command(command: list[str]) -> float:
    """Seconds that a command takes."""
    start = time.perf_counter()
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def time_first_step(folder: Path, repeat: int) -> float:
    """Seconds from launch until the metrics of step 1 are on the disk; validation of step 0 is in it."""
    start = time.perf_counter()
    with training_on_cpu(folder, repeat, _step_done, "training.duration=2 steps", timeout_s=LAUNCH_TIMEOUT_S):
        return time.perf_counter() - start


def _step_done(run: Path) -> bool:
    return any(row["step"] >= 1 and "train/loss" in row for row in read_metrics(run))


def summary(seconds: list[float]) -> dict[str, Any]:
    """Median and spread of repeated measurements."""
    return {
        "median_s": round(statistics.median(seconds), 3),
        "min_s": round(min(seconds), 3),
        "max_s": round(max(seconds), 3),
        "repeats": len(seconds),
    }


def main() -> None:
    """Measure all, print a table, write the JSON file."""
    parser = command_line("startup", __doc__)
    parser.add_argument("--repeats", type=int, default=5, help="measured starts of each kind (default: 5)")
    args = parser.parse_args()
    figures: dict[str, dict[str, Any]] = {}
    for name, command in COMMANDS.items():
        time_command(command)  # not counted: it fills the page cache
        figures[name] = summary([time_command(command) for _ in range(args.repeats)])
    with tempfile.TemporaryDirectory() as folder:
        times = [time_first_step(Path(folder), repeat) for repeat in range(args.repeats + 1)]
    figures["launch_to_first_step"] = summary(times[1:])
    for name, figure in figures.items():
        print(f"{name:<22}{figure['median_s']:8.3f} s  ({figure['min_s']:.3f} to {figure['max_s']:.3f})")
    record(args, {"seconds": figures, "recipe": RECIPE})


if __name__ == "__main__":
    main()
