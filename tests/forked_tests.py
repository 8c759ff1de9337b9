"""Run pytest in many folders from one process that has imported the heavy packages once.

A process of its own (this file as a script) reads one JSON object a line: `folder` (a package, its tests and their
settings), `arguments` (pytest's) and `output` (a file to make). It forks a child for each, `CHILDREN` at a time, and
tells `{"folder": ..., "code": ...}` as each ends. It never imports the package or its tests, so a child finds those of
its folder; and a fork takes milliseconds, the imports of a new process many seconds.
"""

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

CHILDREN = 2
CRASHED = 70
"""Code of a child in which pytest itself fell over; none of pytest's."""
# pyarrow is left out: it starts a thread, and a process with threads must not fork.
HEAVY = (
    "pytest",
    "hypothesis.internal.conjecture.engine",
    "hypothesis.strategies",
    "pydantic",
    "ruamel.yaml",
    "torch",
    "deepspeed",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)
# pytest would rewrite the assertions of its plugins, had they not been imported already.
IMPORTED_ALREADY = ("-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning")


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    Attributes:
        folder: The job's.
        code: pytest's exit code, `CRASHED`, or minus the signal that ended the child.
        output: What it printed.
    """

    folder: Path
    code: int
    output: str


def run_all(jobs: Iterator[tuple[Path, list[str]]], environ: dict[str, str]) -> Iterator[Outcome]:
    """Run pytest in each folder, with its arguments; a job is asked for when a child is free for it."""
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, __file__],
        env=environ | threads,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        _send(server.stdin, jobs, CHILDREN)
        for line in server.stdout:
            ended = json.loads(line)
            folder = Path(ended["folder"])
            output = _output_of(folder)
            yield Outcome(folder, ended["code"], output.read_text(encoding="utf-8", errors="replace"))
            output.unlink()
            _send(server.stdin, jobs, 1)
        assert server.wait() == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # the children too
        server.wait()
        server.stdin.close()
        server.stdout.close()


def _send(stream: IO[str], jobs: Iterator[tuple[Path, list[str]]], most: int) -> None:
    sent = 0
    for folder, arguments in islice(jobs, most):
        job = {"folder": str(folder), "arguments": [*IMPORTED_ALREADY, *arguments], "output": str(_output_of(folder))}
        stream.write(json.dumps(job) + "\n")
        sent += 1
    if sent:
        stream.flush()
    if sent < most:
        stream.close()


def _output_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.output")


def serve() -> None:
    """Import, then fork a child for every line until the input ends."""
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # packages print when they are imported
    sys.path.pop(0)  # the folder of this file is no job's
    for name in HEAVY:
        importlib.import_module(name)
    own = [name for name in sys.modules if name.partition(".")[0] in ("inheritune_ds", "tests")]
    assert not own, f"imported before a folder was known: {own}"
    gc.collect()
    gc.freeze()  # the children share these pages as long as nobody touches them
    running: dict[int, str] = {}
    for line in sys.stdin:
        # A lock that another thread holds during a fork stays locked in the child for ever.
        assert len(list(Path("/proc/self/task").iterdir())) == threading.active_count() == 1
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            _be_child(job["folder"], job["arguments"], job["output"])
        running[child] = job["folder"]
        if len(running) == CHILDREN:
            _reap(running, told)
    while running:
        _reap(running, told)


def _reap(running: dict[int, str], told: IO[str]) -> None:
    child, status = os.wait()
    print(json.dumps({"folder": running.pop(child), "code": os.waitstatus_to_exitcode(status)}), file=told, flush=True)


def _be_child(folder: str, arguments: list[str], output: str) -> None:
    """Run pytest in a folder and end this process with its code; does not return."""
    code = CRASHED
    try:
        printed = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (printed, 1), (printed, 2)):
            os.dup2(source, target)
        os.chdir(folder)
        sys.path.insert(0, folder)
        os.environ["PYTHONPATH"] = folder
        import pytest

        sys.argv = ["pytest", *arguments]
        code = int(pytest.main(arguments))
    except BaseException:  # noqa: BLE001 - whatever it was, the child must end here
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # what the parent would tidy up at its end is not the child's


if __name__ == "__main__":
    serve()
