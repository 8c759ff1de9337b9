"""Start train.py under the `deepspeed` launcher, watch its run folder, end all of its processes."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.record import REPOSITORY
from tests.launching import launcher_line

POLL_S = 0.02


def train_command(*arguments: str, num_gpus: int = 1) -> list[str]:
    """`deepspeed --num_gpus N train.py ...` with this python and a port of its own."""
    return [*launcher_line("deepspeed", num_gpus), str(REPOSITORY / "train.py"), *arguments]


@contextmanager
def launched(
    command: list[str], log: Path, environ: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command in a session of its own, output to a log; whatever still runs is killed at the end."""
    shown = ["deepspeed", *command[3:]] if command[2:3] == ["deepspeed.launcher.runner"] else command
    print("$", shlex.join(shown), flush=True)
    # ninja and the launcher's own children are looked up on the PATH
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, "PATH": path, **(environ or {})},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a launched command and everything it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Poll until something happened; False when the process ended or the time passed without it."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if happened():
            return True
        if process.poll() is not None:
            return happened()
        time.sleep(POLL_S)
    return False
