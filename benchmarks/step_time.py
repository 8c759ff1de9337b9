"""Where a step's time goes at the quickstart's size: outside the forward and backward passes, and waiting for tokens.

`python -m benchmarks.step_time` starts `deepspeed train.py` on the quickstart's reference recipe with
ds_configs/cpu.json, several times, and writes docs/results/step_time.json from the runs' own metrics of every step
after the tenth. DeepSpeed reduces the gradients inside the last backward pass. It ends with 1 if a bar is missed.
"""

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.launch import RECIPE, training_on_cpu
from benchmarks.record import command_line, record
from inheritune_ds.storage.files import read_json
from inheritune_ds.tracking.metrics import read_metrics

WARM_UP_STEPS, STEPS = 10, 50
BARS = {"perf/outside_ratio": 0.10, "perf/data_wait_ratio": 0.001}
RUN_TIMEOUT_S = 600.0
NEVER = ("validation.interval_steps=1000", "checkpoint.interval_steps=1000")


def one_run(folder: Path, number: int) -> list[dict[str, float]]:
    """Metrics of every step after the warm-up."""
    overrides = (f"training.duration={WARM_UP_STEPS + STEPS} steps", *NEVER)
    with training_on_cpu(folder, number, _finished, *overrides, timeout_s=RUN_TIMEOUT_S) as run:
        rows = [row for row in read_metrics(run) if "perf/step_ms" in row and row["step"] > WARM_UP_STEPS]
    assert len(rows) == STEPS, f"{len(rows)} of {STEPS} steps were made"
    return rows


def _finished(run: Path) -> bool:
    return (read_json(run / "status.json") or {}).get("state") == "finished"


def main() -> None:
    """Run, print a table, write the JSON file."""
    parser = command_line("step_time", __doc__)
    parser.add_argument("--starts", type=int, default=3, help="runs, each a process of its own (default: 3)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [one_run(Path(folder), number) for number in range(args.starts)]
    figures: dict[str, dict[str, Any]] = {}
    for name in ("perf/step_ms", *BARS):
        by_run = [statistics.median(row[name] for row in rows) for rows in runs]
        figures[name] = {"median": statistics.median(by_run), "runs": by_run, "bar": BARS.get(name)}
        print(f"{name:<24}{statistics.median(by_run):12.5f}  ({min(by_run):.5f} to {max(by_run):.5f})")
    record(args, {"recipe": RECIPE, "steps": STEPS, "figures": figures})
    if any(figures[name]["median"] > bar for name, bar in BARS.items()):
        sys.exit("a bar is missed")


if __name__ == "__main__":
    main()
