"""Where a step's time goes at the quickstart's size: outside the forward and backward passes, and waiting for tokens.

`python -m benchmarks.step_time` starts `deepspeed train.py` on the quickstart's reference recipe with
ds_configs/cpu.json, several times, and writes docs/results/step_time.json from the runs' own metrics of every step
after the tenth. DeepSpeed reduces the gradients inside the last backward pass. It ends with 1 if a bar is missed.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.launch import launched, train_command, wait_for
from benchmarks.record import RESULTS, write_result
from inheritune_ds.storage.files import read_json
from inheritune_ds.tracking.metrics import read_metrics

RECIPE = "quickstart-reference"
WARM_UP_STEPS, STEPS = 10, 50
BARS = {"perf/outside_ratio": 0.10, "perf/data_wait_ratio": 0.001}
RUN_TIMEOUT_S = 600.0


def one_run(folder: Path, number: int) -> list[dict[str, float]]:
    """Metrics of every step after the warm-up."""
    runs = folder / f"runs-{number}"
    command = train_command(
        *("--deepspeed_config", "ds_configs/cpu.json", "--recipe", RECIPE),
        *("--runs-dir", str(runs), "--cache-dir", str(folder / "cache")),
        *(f"training.duration={WARM_UP_STEPS + STEPS} steps", "schedule.warmup_steps=0"),
        *("logging.interval_steps=1", "validation.interval_steps=1000", "checkpoint.interval_steps=1000"),
    )
    log = folder / "log"
    with launched(command, log, {"DS_ACCELERATOR": "cpu", "WANDB_MODE": "offline"}) as process:
        wait_for(
            lambda: (read_json(runs / RECIPE / "status.json") or {}).get("state") == "finished", process, RUN_TIMEOUT_S
        )
    rows = [row for row in read_metrics(runs / RECIPE) if "perf/step_ms" in row and row["step"] > WARM_UP_STEPS]
    if len(rows) != STEPS:
        sys.exit(f"{len(rows)} of {STEPS} steps were made; the log's end:\n{log.read_text(encoding='utf-8')[-3000:]}")
    return rows


def main() -> None:
    """Run, print a table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--starts", type=int, default=3, help="runs, each a process of its own (default: 3)")
    parser.add_argument("--out", type=Path, default=RESULTS / "step_time.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [one_run(Path(folder), number) for number in range(args.starts)]
    figures: dict[str, dict[str, Any]] = {}
    for name in ("perf/step_ms", *BARS):
        by_run = [statistics.median(row[name] for row in rows) for rows in runs]
        figures[name] = {"median": statistics.median(by_run), "runs": by_run, "bar": BARS.get(name)}
        print(f"{name:<24}{statistics.median(by_run):12.5f}  ({min(by_run):.5f} to {max(by_run):.5f})")
    write_result(args.out, {"recipe": RECIPE, "steps": STEPS, "figures": figures})
    if any(figures[name]["median"] > bar for name, bar in BARS.items()):
        sys.exit("a bar is missed")


if __name__ == "__main__":
    main()
