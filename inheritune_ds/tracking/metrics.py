"""Metrics: the table of all names, and metrics.jsonl."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from inheritune_ds.errors import RunFolderError

TOKENS = "train/tokens"


class Metric(NamedTuple):
    """Unit and meaning of a metric."""

    unit: str
    meaning: str


METRICS: Mapping[str, Metric] = {
    TOKENS: Metric("tokens", "tokens trained on since step 0"),
    "train/loss": Metric("nats/token", "mean loss over all target tokens of the global batch"),
    "train/lr": Metric("1", "learning rate used in the step"),
    "train/grad_norm": Metric("1", "L2 norm of the gradient of all parameters, before clipping"),
    "train/skipped_steps": Metric(
        "steps", "steps since step 0 whose update was left out: a loss or gradient not finite, or a spike"
    ),
    "train/rollbacks": Metric("1", "how often the run has gone back to a checkpoint after faults in a row"),
    "val/loss": Metric("nats/token", "mean loss over the fixed validation windows"),
    "val/stderr": Metric("nats/token", "standard error of val/loss, s / sqrt(n) over the windows"),
    "val/ppl": Metric("1", "perplexity, exp(val/loss)"),
    "perf/tokens_per_s": Metric("tokens/s", "tokens trained on per second, all ranks together"),
    "perf/step_ms": Metric("ms", "wall-clock time of a step"),
    "perf/outside_ratio": Metric("ratio", "share of a step outside the forward and backward passes of rank 0"),
    "perf/data_wait_ratio": Metric("ratio", "share of a step that rank 0 waited for its tokens"),
    "perf/mfu": Metric("ratio", "model FLOPs per second over the peak of the devices in the run's precision"),
    "data/<source>/tokens_seen": Metric("tokens", "tokens of that source trained on since step 0"),
    "data/<source>/unique_tokens": Metric(
        "tokens", "different ones among them; not told with `sampling: random`, which may give parts of a window again"
    ),
    "data/<source>/epochs": Metric("1", "tokens seen of that source / tokens of its windows"),
    "mem/peak_gib": Metric("GiB", "peak memory allocated on the device of rank 0"),
}
"""Every name that may be logged."""


def listed(name: str) -> str:
    """The name under which METRICS lists a metric: every source has its own of `data/`."""
    return re.sub(r"^data/[^/]+/", "data/<source>/", name)


METRICS_FILE = "metrics.jsonl"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read the rows of a run's metrics.jsonl, oldest first.

    An incomplete last line, which a killed writer leaves, is passed over.

    Args:
        run_dir: A run folder; an empty list when it holds no metrics yet.

    Raises:
        RunFolderError: When any other line is not a JSON object with step and train/tokens.
    """
    path = run_dir / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        row = _parse_row(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            raise RunFolderError(
                f"{path}, line {number} is not a row of metrics: {line[:80]!r}",
                allowed="a JSON object with step and train/tokens on each line",
                action="restore that line, or delete it",
            )
    return rows


def _parse_row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    is_row = isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("train/tokens"), int)
    return row if is_row else None
