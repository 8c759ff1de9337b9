"""What a run tells while it trains: metric names, metrics.jsonl, Weights & Biases, the progress line.

`metrics.jsonl` is the source of truth; W&B gets a copy and never stops a run.
"""

import json
import math
import netrc
import os
import re
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import IO, Any, Literal, NamedTuple

from inheritune_ds.analysis.results import METRICS_FILE, read_metrics
from inheritune_ds.errors import StorageError, TrainingError
from inheritune_ds.files import write_exact, write_text
from inheritune_ds.recipe import Recipe
from inheritune_ds.row_log import RowLog

TOKENS = "train/tokens"
PLAIN_INTERVAL_S = 10.0
"""Seconds between the progress lines of a run whose output is not a terminal."""
_WANDB_HOST = "api.wandb.ai"


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


def _listed(name: str) -> str:
    """The name under which METRICS lists a metric: every source has its own of `data/`."""
    return re.sub(r"^data/[^/]+/", "data/<source>/", name)


class Tracker:
    """Writes the metrics of one run; only rank 0 makes one.

    Args:
        run_dir: The run folder; it exists.
        recipe: The recipe of the run (W&B gets it as the run's config).
        resume_step: Step of the checkpoint that the run goes on from: later rows are dropped, since
            they will be written again. None starts anew and drops every row.

    Raises:
        RunFolderError: When metrics.jsonl is damaged.
        StorageError: When metrics.jsonl cannot be written.
    """

    def __init__(self, run_dir: Path, recipe: Recipe, *, resume_step: int | None) -> None:
        self._path = run_dir / METRICS_FILE
        self._rows = self._open(-1 if resume_step is None else resume_step)
        self._wandb = _start_wandb(run_dir, recipe)

    def _open(self, step: int) -> RowLog:
        """Open metrics.jsonl behind the rows up to a step; later ones are dropped."""
        rows = read_metrics(self._path.parent) if step >= 0 else []
        write_exact(self._path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
        return RowLog(self._path)

    def rewind(self, step: int) -> None:
        """Drop the rows after a step, which the run does again; W&B keeps them, and takes no new ones for them.

        Raises:
            StorageError: When the file cannot be rewritten.
        """
        refusal = self._rows.close()
        if refusal is not None:
            raise self._lost(refusal)
        self._rows = self._open(step)

    def _lost(self, refusal: OSError) -> StorageError:
        return StorageError(
            f"{self._path} cannot be written: {refusal.strerror}; {self._rows.waiting} rows are missing",
            action="free some space, then give the same command again: it goes on from the newest checkpoint",
        )

    def log(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        """Append a row.

        Args:
            step: Updates done so far.
            tokens: Tokens trained on so far (the metric `train/tokens`).
            values: Metric name to value; the names stand in METRICS.

        Raises:
            ValueError: For a name that METRICS does not list.
            TrainingError: For a value that is not a finite number; nothing is written.
        """
        unknown = sorted(name for name in values if name == TOKENS or _listed(name) not in METRICS)
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: not a metric that may be logged; tracking.METRICS lists them")
        row: dict[str, int | float] = {"step": step, TOKENS: tokens}
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"step {step}: {name} is {value}",
                    allowed="a finite number",
                    action="lower optimizer.lr, or look at the data of that step",
                )
            row[name] = value if isinstance(value, int) else float(value)
        refusal = self._rows.append(json.dumps(row))
        if refusal is not None and self._rows.waiting == 1:
            print(
                f"WARNING: {self._path} cannot be written: {refusal.strerror}. The run goes on; its rows are kept in "
                "memory until there is room",
                flush=True,
            )
        self._send(row)

    def close(self) -> None:
        """Finish both logs; a second call does nothing.

        Raises:
            StorageError: When rows are still missing in metrics.jsonl.
        """
        refusal = self._rows.close()
        run, self._wandb = self._wandb, None
        if run is not None:
            try:
                run.finish()
            except Exception as error:  # noqa: BLE001 (the run itself is well: W&B never stops it)
                _say_lost("did not finish", error)
        if refusal is not None:
            raise self._lost(refusal)

    def _send(self, row: Mapping[str, float]) -> None:
        if self._wandb is None:
            return
        try:
            self._wandb.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])
        except Exception as error:  # noqa: BLE001 (W&B never stops a run)
            self._wandb = None
            _say_lost("stopped", error)


def _start_wandb(run_dir: Path, recipe: Recipe) -> Any | None:
    """Start the W&B run of this run folder; None (said in one line) when W&B cannot start."""
    # W&B reports its own crashes over the network, offline runs included; a run talks to nobody unasked.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb

        settings = wandb.Settings(
            console="off",
            silent=True,
            # No secret leaves: not the command line, the environment, the code, or the machine's description.
            save_code=False,
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            x_disable_stats=True,
            # An unreachable server costs this much, once, and no more at the end.
            init_timeout=30.0,
            login_timeout=30.0,
            finish_timeout=60.0,
        )
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or recipe.logging.wandb_project,
            name=os.environ.get("WANDB_NAME") or recipe.name,
            id=_wandb_id(run_dir),
            dir=str(run_dir),
            config=recipe.model_dump(mode="json"),
            mode=_wandb_mode(),
            resume="allow",
            settings=settings,
        )
        run.define_metric(TOKENS)
        run.define_metric("*", step_metric=TOKENS)
    except Exception as error:  # noqa: BLE001 (whatever W&B raises: metrics.jsonl is enough to go on)
        _say_lost("could not start", error)
        return None
    if run.offline:
        print(f"W&B: offline; to upload later: wandb sync {run_dir}/wandb/offline-run-*", flush=True)
    elif run.url:
        print(f"W&B: {run.url}", flush=True)
    return run


def _say_lost(what: str, error: Exception) -> None:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    print(f"W&B {what}: {reason}. The run goes on; {METRICS_FILE} holds every metric.", flush=True)


def _wandb_id(run_dir: Path) -> str:
    """Return the W&B id of a run folder: WANDB_RUN_ID or a new one, then always the same."""
    path = run_dir / "wandb_id"
    if path.exists():
        return path.read_text(encoding="utf-8").strip()
    identity = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    write_text(path, f"{identity}\n")
    return identity


def _wandb_mode() -> Literal["online", "offline"] | None:
    """Online when W&B is configured; None, which leaves the choice to WANDB_MODE, when that is set."""
    if os.environ.get("WANDB_MODE"):
        return None
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        known = netrc.netrc(path).authenticators(_WANDB_HOST) is not None
    except (OSError, ValueError, netrc.NetrcParseError):
        known = False
    return "online" if known else "offline"


class Progress:
    """The progress of a run: a bar on a terminal, a plain line every ten seconds elsewhere.

    Args:
        total_steps: Steps of the whole run.
        start_step: Steps done before this launch.
        label: What the line begins with, the run's name.
        file: Where to write; standard output when left out.
    """

    def __init__(self, total_steps: int, start_step: int, label: str, *, file: IO[str] | None = None) -> None:
        self._total_steps = total_steps
        self._label = label
        self._file = file or sys.stdout
        self._begun: tuple[float, int] | None = None
        self._printed_at = -math.inf
        self._pending = ""
        self._bar: Any = None
        self._task: Any = None
        if self._file.isatty():
            self._bar, self._task = self._make_bar(start_step)

    def _make_bar(self, start_step: int) -> tuple[Any, Any]:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        bar = RichProgress(
            TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[numbers]}"),
            console=Console(file=self._file),
            expand=True,
        )
        task = bar.add_task(self._label, total=self._total_steps, completed=start_step, numbers="")
        bar.start()
        return bar, task

    def update(self, step: int, loss: float, tokens_per_s: float) -> None:
        """Show a step.

        Args:
            step: Steps done.
            loss: Training loss of the step, nats per token.
            tokens_per_s: Speed, all ranks together.
        """
        now = monotonic()
        numbers = f"loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s  {self._time_left(now, step)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
            return
        self._pending = f"{self._label}  step {step}/{self._total_steps}  {numbers}"
        if now - self._printed_at >= PLAIN_INTERVAL_S:
            self._printed_at = now
            self._print_pending()

    def say(self, line: str) -> None:
        """Print a line of its own, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=self._file, flush=True)

    def close(self) -> None:
        """Leave the last state on the screen; a second call does nothing."""
        if self._bar is not None:
            self._bar.stop()
        self._print_pending()

    def _print_pending(self) -> None:
        if self._pending:
            print(self._pending, file=self._file, flush=True)
            self._pending = ""

    def _time_left(self, now: float, step: int) -> str:
        # From the first update on, since what comes before it (compiling, the first step) is paid once.
        if self._begun is None:
            self._begun = now, step
        begun_at, begun_step = self._begun
        if step == begun_step:
            return "time left unknown" if step < self._total_steps else "done"
        seconds = round((now - begun_at) / (step - begun_step) * (self._total_steps - step))
        if step >= self._total_steps:
            return "done"
        hours, rest = divmod(seconds, 3600)
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d} left"
