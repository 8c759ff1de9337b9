"""Start train.py under the `deepspeed` launcher, watch its run folder, end all of its processes."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.record import REPOSITORY
from tests.launching import launcher_line

POLL_S = 0.02
RECIPE = "quickstart-reference"  # needs no other run first


def train_command(*arguments: str, num_gpus: int = 1) -> list[str]:
    """`deepspeed --num_gpus N train.py ...` with this python and a port of its own."""
    return [*launcher_line("deepspeed", num_gpus), str(REPOSITORY / "train.py"), *arguments]


def start(command: Sequence[str], log: Path, *, cwd: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, and append its output to a log."""
    with log.open("ab") as stream:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@contextmanager
def launched(
    command: list[str], log: Path, environ: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command as `start` does; whatever still runs is killed at the end."""
    shown = ["deepspeed", *command[3:]] if command[2:3] == ["deepspeed.launcher.runner"] else command
    print("$", shlex.join(shown), flush=True)
    # ninja and the launcher's own children are looked up on the PATH
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    process = start(command, log, cwd=REPOSITORY, env={**os.environ, "PATH": path, **(environ or {})})
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a launched command and everything it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(
    happened: Callable[[], bool], process: subprocess.Popen[bytes], timeout_s: float, poll_s: float = POLL_S
) -> bool:
    """Poll until something happened; False when the process ended or the time passed without it."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if happened():
            return True
        if process.poll() is not None:
            return happened()
        time.sleep(poll_s)
    return False


@contextmanager
def training_on_cpu(
    folder: Path, number: int, reached: Callable[[Path], bool], *overrides: str, timeout_s: float
) -> Iterator[Path]:
    """Train the quickstart's reference recipe with ds_configs/cpu.json; enters once the run folder has reached a state.

    Gives the run folder. Token files are kept in `folder` for the next run, which has another number. Exits if the run
    ends before.
    """
    run, log = folder / f"runs-{number}" / RECIPE, folder / "log"
    command = train_command(
        *("--deepspeed_config", "ds_configs/cpu.json", "--recipe", RECIPE),
        *("--runs-dir", str(run.parent), "--cache-dir", str(folder / "cache")),
        *("schedule.warmup_steps=0", "logging.interval_steps=1", *overrides),
    )
    with launched(command, log, {"DS_ACCELERATOR": "cpu", "WANDB_MODE": "offline"}) as process:
        if not wait_for(lambda: reached(run), process, timeout_s):
            sys.exit(f"the run has ended too early; the log's end:\n{log.read_text(encoding='utf-8')[-3000:]}")
        yield run
