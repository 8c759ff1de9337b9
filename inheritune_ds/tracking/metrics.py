"""Metrics: their names, and the rows of metrics.jsonl.

A row has finite values only. A skipped update may have no loss or gradient norm: its log line has the reason, and
`train/skipped_steps` counts it. A validation loss that is not finite ends the run.
"""

import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from inheritune_ds.errors import RunFolderError, StorageError
from inheritune_ds.storage.files import storage_errors, write_exact

TOKENS = "train/tokens"
METRICS_FILE = "metrics.jsonl"
Row = dict[str, Any]
logger = logging.getLogger(__name__)


class Metric(NamedTuple):
    """How a metric is described."""

    unit: str
    meaning: str


METRICS: Mapping[str, Metric] = {
    TOKENS: Metric("tokens", "tokens trained on since step 0"),
    "train/loss": Metric("nats/token", "mean loss over all target tokens of the global batch"),
    "train/lr": Metric("1", "learning rate used in the step"),
    "train/grad_norm": Metric("1", "L2 norm of the gradient of all parameters, before clipping"),
    "train/skipped_steps": Metric("steps", "skipped updates since step 0: a loss or gradient not finite, or a spike"),
    "train/rollbacks": Metric("1", "rollbacks to a checkpoint after faults in a row"),
    "val/loss": Metric("nats/token", "mean loss over the fixed validation windows"),
    "val/stderr": Metric(
        "nats/token", "standard error of val/loss over documents; not logged below two effective ones"
    ),
    "val/ppl": Metric("1", "perplexity, exp(val/loss)"),
    "perf/tokens_per_s": Metric("tokens/s", "tokens trained on per second, all ranks together"),
    "perf/step_ms": Metric("ms", "wall-clock time of a step"),
    "perf/outside_ratio": Metric("ratio", "share of a step outside the forward and backward passes of rank 0"),
    "perf/data_wait_ratio": Metric("ratio", "share of a step that rank 0 waited for its tokens"),
    "perf/mfu": Metric("ratio", "model FLOPs per second over the peak of the devices in the run's precision"),
    "data/<source>/tokens_seen": Metric("tokens", "tokens of that source trained on since step 0"),
    "data/<source>/unique_tokens": Metric("tokens", "different ones among them; not logged with `sampling: random`"),
    "data/<source>/epochs": Metric("1", "tokens seen of that source / tokens of its windows"),
    "mem/peak_gib": Metric("GiB", "peak memory allocated on the device of rank 0"),
}
"""Every name that may be logged."""


def make_row(step: int, tokens: int, values: Mapping[str, float]) -> Row:
    """Make a row of metrics after `step` updates, with the finite values only.

    Raises:
        ValueError: For a name that METRICS does not list.
    """
    unknown = sorted(name for name in values if name == TOKENS or _listed(name) not in METRICS)
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not a metric that may be logged; tracking.metrics.METRICS lists them")
    finite = {key: x if isinstance(x, int) else float(x) for key, x in values.items() if math.isfinite(x)}
    return {"step": step, TOKENS: tokens, **finite}


def _listed(name: str) -> str:
    """The metric's name in METRICS, which lists those of one source."""
    return re.sub(r"^data/[^/]+/", "data/<source>/", name)


class MetricFile:
    """Appends rows to a run's metrics.jsonl; rows that the disk refuses are written with the next row.

    A killed process leaves at most one incomplete line.

    At its start it drops the rows after `resume_step`, the step of the checkpoint; None drops every row.

    Raises:
        RunFolderError: When metrics.jsonl is damaged.
        StorageError: When metrics.jsonl cannot be written.
    """

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        self._path = run_dir / METRICS_FILE
        self._waiting: list[bytes] = []
        self._open([] if resume_step is None else read_metrics(run_dir), resume_step or 0)

    def _open(self, rows: Sequence[Row], step: int) -> None:
        """Rewrite the file with the rows up to a step, and open it for appending."""
        write_exact(self._path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
        with storage_errors(self._path):
            self._descriptor: int | None = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        self._bytes = os.fstat(self._descriptor).st_size

    def append(self, row: Row) -> None:
        """Write the waiting rows and this one; logs the first refusal of the disk."""
        self._waiting.append(json.dumps(row).encode() + b"\n")
        refusal = self._write()
        if refusal is not None and len(self._waiting) == 1:
            logger.warning(
                "%s cannot be written: %s. The run continues; its rows are kept in memory until there is room",
                self._path,
                refusal.strerror,
            )

    def rewind(self, step: int) -> None:
        """Drop the rows after a step, which the run repeats.

        Raises:
            StorageError: When the file cannot be rewritten.
        """
        self.close()
        self._open(read_metrics(self._path.parent), step)

    def close(self) -> None:
        """Write the waiting rows and close the file; a second call does nothing.

        Raises:
            StorageError: When rows are still missing in the file.
        """
        if self._descriptor is None:
            return
        refusal = self._write()
        os.close(self._descriptor)
        self._descriptor = None
        if refusal is not None:
            raise StorageError(
                f"{self._path} cannot be written: {refusal.strerror}; {len(self._waiting)} rows are missing",
                action="free some space, then rerun the same command to resume from the newest checkpoint",
            )

    def _write(self) -> OSError | None:
        """Write the waiting rows; returns the error of the disk, if any."""
        assert self._descriptor is not None
        data = memoryview(b"".join(self._waiting))
        done = 0
        try:
            while done < len(data):
                done += os.write(self._descriptor, data[done:])
        except OSError as error:
            with suppress(OSError):  # no partial line before the next attempt
                os.ftruncate(self._descriptor, self._bytes)
            return error
        self._bytes += len(data)
        self._waiting.clear()
        return None


def read_metrics(run_dir: Path) -> list[Row]:
    """Read the rows of a run's metrics.jsonl, oldest first, except an incomplete last line of a killed writer.

    Raises:
        RunFolderError: When any other line is not a JSON object with step and train/tokens.
    """
    path = run_dir / METRICS_FILE
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
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


def _parse_row(line: str) -> Row | None:
    with suppress(ValueError):
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get(TOKENS), int):
            return row
    return None


@dataclass(frozen=True)
class Curve:
    """A metric over training."""

    tokens: tuple[int, ...]
    values: tuple[float, ...]
    stderr: tuple[float, ...] = ()
    """One standard error for each value, or empty."""


def curve(rows: Sequence[Row], name: str, stderr: str | None = None) -> Curve:
    """The curve of the metric `name` over the rows that have it.

    If one is named, with its standard error `stderr`, 0 where a row has none.
    """
    rows = [row for row in rows if name in row]
    tokens, values = tuple(row[TOKENS] for row in rows), tuple(row[name] for row in rows)
    return Curve(tokens, values, tuple(row.get(stderr, 0.0) for row in rows) if stderr else ())
