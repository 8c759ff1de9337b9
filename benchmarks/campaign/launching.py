"""Tiny runs for the campaign: recipe, launch, processes, results."""

import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from benchmarks.launch import kill, start, wait_for
from benchmarks.record import REPOSITORY
from inheritune_ds.checkpoints.store import CheckpointStore
from inheritune_ds.checkpoints.train_state import SavedLayout, TrainState
from inheritune_ds.storage.files import blake3_file, read_json, sha256_file
from inheritune_ds.tracking.metrics import read_metrics
from tests import tiny
from tests.launching import environment, launcher_line, numerics

MARK = "INHERITUNE_CAMPAIGN"
"""A variable that every process of a launch inherits, whatever session or group it moves to."""
TROUBLED = "benchmarks/campaign/drive_train.py"
"""train.py with a trouble, which is named in the variable TROUBLE."""
POLL_S = 0.002
START_TIMEOUT_S = 600.0
"""For a machine that is very busy; the first start of all compiles an operator of DeepSpeed, too."""
Launcher = Literal["python", "deepspeed", "torchrun"]

SHAPE = {**tiny.LLAMA, "vocab_size": 300, "num_hidden_layers": 2}
RANKS: Mapping[Launcher, int] = {"python": 1, "deepspeed": 2, "torchrun": 2}
"""Of a launch that does not name their number."""


class _LineHandler(logging.Handler):
    """Collects what the package logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        level = f"{record.levelname}: " if record.levelno > logging.INFO else ""
        self.lines.append(f"{level}{record.getMessage()}")


@contextmanager
def logged() -> Iterator[list[str]]:
    """Collect the lines that this process logs in the block."""
    handler, logger = _LineHandler(), logging.getLogger("inheritune_ds")
    before = logger.handlers[:]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield handler.lines
    finally:
        logger.handlers[:] = before


def write_recipe(folder: Path, name: str = "tiny", **sections: Any) -> Path:
    """Write a recipe and its corpus; keyword arguments replace whole sections.

    12 steps of 512 tokens, a checkpoint every 4, every step logged, dropout on. Returns the path of the recipe.
    """
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        tiny.write_corpus(corpus)
    usual = {
        "name": name,
        "target": {"shape": SHAPE, "dropout": 0.1},
        "corpus": {
            "sources": [{"kind": "files", "paths": [str(corpus)]}],
            "tokenizer": {"vocab_size": 300},
            "validation_ratio": 0.1,
        },
        "training": {"seq_len": 32, "global_batch_tokens": 512, "duration": "12 steps"},
        "schedule": {"kind": "cosine", "warmup_steps": 2},
        "validation": {"interval_steps": 6, "max_tokens": 1024},
        "checkpoint": {"interval_steps": 4},
        "logging": {"interval_steps": 1},
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(tiny.document(**{**usual, **sections})), encoding="utf-8")  # JSON is YAML
    return path


def write_ds_config(
    folder: Path, name: str = "ds", *, stage: int = 1, precision: str = "fp32", micro_batch: int = 2, **keys: Any
) -> Path:
    """Write a DeepSpeed config, in fp32 or bf16; other keys replace whole blocks. Returns its path."""
    document = {
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": precision == "bf16"},
        "train_micro_batch_size_per_gpu": micro_batch,
        **keys,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def arguments(recipe: Path, ds_config: Path, folder: Path, *more: str, runs: str = "runs") -> list[str]:
    """Arguments of train.py; token files below `folder/cache`, the run folder below `folder/<runs>`."""
    folders = ["--runs-dir", str(folder / runs), "--cache-dir", str(folder / "cache")]
    return ["--deepspeed_config", str(ds_config), "--recipe", str(recipe), *folders, *more]


@dataclass
class Launched:
    """A started run: the launcher in a session and group of its own, its log, and its MARK.

    `begun_s` is comparable to st_mtime.
    """

    process: subprocess.Popen[bytes]
    log: Path
    mark: str
    begun_s: float

    def output(self) -> str:
        """The output so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait(self, timeout_s: float = START_TIMEOUT_S) -> int:
        """Wait for the end; the exit code. AssertionError with the end of the output after `timeout_s`."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended after {timeout_s:.0f} s\n{self.output()[-6000:]}") from None

    def wait_for(self, happened: Callable[[], bool], timeout_s: float = START_TIMEOUT_S) -> None:
        """Poll until something happened. AssertionError if the run ends before, or after `timeout_s`."""
        if not wait_for(happened, self.process, timeout_s, POLL_S):
            ended = self.process.poll()
            when = f"within {timeout_s:.0f} s" if ended is None else f"before the end with {ended}"
            raise AssertionError(f"has not happened {when}\n{self.output()[-6000:]}")

    def ranks(self) -> dict[int, int]:
        """Rank -> process id of the training processes that run now."""
        found: dict[int, int] = {}
        for pid in processes_with(self.mark):
            words = _words(pid, "environ")
            rank = next((word.partition("=")[2] for word in words if word.startswith("RANK=")), None)
            if rank is not None and any(word.endswith("train.py") for word in _words(pid, "cmdline")):
                found.setdefault(int(rank), pid)
        return found

    def orphans(self, patience_s: float = 5.0) -> list[str]:
        """Command lines of processes that are still there `patience_s` after the end of the launcher."""
        deadline_s = time.monotonic() + patience_s
        while (left := processes_with(self.mark)) and time.monotonic() < deadline_s:
            time.sleep(0.02)
        return [" ".join(_words(pid, "cmdline")) for pid in left]


def processes_with(mark: str) -> list[int]:
    """Ids of living processes whose environment has MARK with this value."""
    wanted = f"{MARK}={mark}"
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if wanted in _words(int(path.name), "environ")]


def _words(pid: int, kind: str) -> list[str]:
    """The parts of /proc/PID/environ or cmdline; empty for a process that has ended or is another user's."""
    try:
        return Path(f"/proc/{pid}/{kind}").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return []


@contextmanager
def started(
    folder: Path,
    *words: str,
    launcher: Launcher = "python",
    ranks: int | None = None,
    script: str = "train.py",
    **extra: str,
) -> Iterator[Launched]:
    """Start a script of the repository in `folder`, output to a new log there; kill all that remains at the end.

    `ranks` are those of RANKS by default, `extra` variables of the environment.
    """
    number = len(list(folder.glob("log-*.txt"))) + 1
    log, mark, begun_s = folder / f"log-{number:03d}.txt", f"{folder}#{number}", time.time()
    command = [*launcher_line(launcher, ranks or RANKS[launcher]), str(REPOSITORY / script), *words]
    process = start(command, log, cwd=folder, env=environment(**{MARK: mark, **extra}))
    launched = Launched(process, log, mark, begun_s)
    try:
        yield launched
    finally:
        kill(process)
        for pid in processes_with(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def run_to_end(folder: Path, *words: str, expect: int = 0, **how: Any) -> str:
    """Start as `started` does and wait for the end; the output. Asserts the exit code and that no process remains."""
    with started(folder, *words, **how) as launched:
        code, output = launched.wait(), launched.output()
        assert code == expect, f"exit code {code}, not {expect}\n{output[-6000:]}"
        assert (left := launched.orphans()) == [], f"processes stay: {left}"
    return output


def last_step(run: Path) -> int:
    """Step of the last complete row; -1 before there is one."""
    return max((int(row["step"]) for row in read_metrics(run)), default=-1)


def status(run: Path) -> dict[str, Any]:
    """The run's status.json; empty before there is one."""
    return dict(read_json(run / "status.json") or {})


def choose(store: CheckpointStore) -> tuple[Path, list[str], float]:
    """The newest intact checkpoint, the logged lines, and the seconds that it took. AssertionError if it is none."""
    start_s = time.monotonic()
    with logged() as lines:
        chosen = store.newest_intact()
    assert chosen is not None, "None was chosen"
    return chosen.path, lines, time.monotonic() - start_s


def publish_made(store: CheckpointStore, step: int, files: Mapping[str, bytes]) -> None:
    """Publish a checkpoint of two ranks that no run has saved."""
    temporary = store.begin(step)
    listed = {}
    for name, content in files.items():
        (temporary / name).write_bytes(content)
        listed[name] = {"bytes": len(content), "blake3": blake3_file(temporary / name)}
    fields = {"state": TrainState(step).as_dict(), "layout": asdict(SavedLayout(2, 1, "fp32"))}
    store.publish(temporary, step, fields, listed)


def weights_sha256(run: Path) -> str:
    """sha256 (hex) of the exported weights."""
    return sha256_file(run / "export" / "model.safetensors")


class TinyRun:
    """A scratch folder, the command of a run in it, and the folder of the run.

    Args:
        folder: Scratch folder; recipe and DeepSpeed config are written to it.
        launcher: Of every launch.
        name: Of the run.
        runs: Folder of run folders, below `folder`.
        config: Arguments of `write_ds_config`.
        sections: Of the recipe.
    """

    def __init__(
        self,
        folder: Path,
        launcher: Launcher = "python",
        *,
        name: str = "tiny",
        runs: str = "runs",
        config: Mapping[str, Any] = MappingProxyType({}),
        **sections: Any,
    ) -> None:
        self.folder, self.launcher, self.path = folder, launcher, folder / runs / name
        recipe, ds_config = write_recipe(folder, name, **sections), write_ds_config(folder, **config)
        self.words = arguments(recipe, ds_config, folder, runs=runs)

    def started(self, *more: str, **how: Any) -> AbstractContextManager[Launched]:
        """`started` with this command."""
        return started(self.folder, *self.words, *more, launcher=self.launcher, **how)

    def to_end(self, *more: str, **how: Any) -> str:
        """`run_to_end` with this command."""
        return run_to_end(self.folder, *self.words, *more, launcher=self.launcher, **how)

    def set_aside(self) -> Path:
        """Move the run folder, so that the command starts another run; its new path."""
        return self.path.rename(self.folder / "aside")


def check_same(run: Path, straight: Path, what: str) -> None:
    """Assert that two finished runs have the same weights and logged values."""
    assert weights_sha256(run) == weights_sha256(straight), f"{what}: other weights"
    assert numerics(run) == numerics(straight), f"{what}: other values were logged"
