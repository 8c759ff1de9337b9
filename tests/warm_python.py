"""Python processes that start with the heavy packages imported: a server imports them once and forks.

`WarmPython.start` runs `python WORDS` like `subprocess.Popen`. The server (this file as a script) has one thread: a
lock that another thread holds during a fork would stay locked in the child. Three things differ from a new process:
imports have read the server's environment, /proc/PID/cmdline and /proc/PID/environ are the server's, and all ranks
order their sets alike, with the server's hash seed.
"""

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

ONE_THREAD = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow's allocator would start a thread
}
_LONGEST_JOB = 2**20


class WarmProcess:
    def __init__(self, server: "WarmPython", pid: int) -> None:
        self._server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._ended(timeout)
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(["warm python", str(self.pid)], timeout)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout_s: float | None) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.code_of(self.pid, timeout_s)
        return self.returncode


class WarmPython:
    """An interpreter that imports `modules` once, in this order and with `environ`, and then forks."""

    def __init__(self, modules: Sequence[str], environ: Mapping[str, str]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._codes: dict[int, int] = {}
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), *modules],
                env={**environ, **ONE_THREAD},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # packages print when they are imported
                start_new_session=True,
            )

    def start(
        self,
        words: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdout: IO[Any] | int,
        stderr: IO[Any] | int | None = None,
        start_new_session: bool = False,
    ) -> WarmProcess:
        """Start `python WORDS`: a script or -m MODULE or -c CODE, and arguments. Without `stderr` it is `stdout`."""
        out = stdout if isinstance(stdout, int) else stdout.fileno()
        errors = out if stderr is None else stderr if isinstance(stderr, int) else stderr.fileno()
        job = {"words": list(words), "cwd": str(cwd), "env": dict(env), "session": start_new_session}
        socket.send_fds(self._socket, [json.dumps(job).encode()], [out, errors])
        while True:
            message = self._receive(None)
            assert message is not None
            if "code" not in message:
                return WarmProcess(self, message["pid"])

    def code_of(self, pid: int, timeout_s: float | None) -> int | None:
        """The exit code of a process; None if it has not ended within the timeout."""
        while pid not in self._codes and self._receive(timeout_s) is not None:
            pass
        return self._codes.pop(pid, None)

    def _receive(self, timeout_s: float | None) -> dict[str, int] | None:
        if not select.select([self._socket], [], [], timeout_s)[0]:
            return None
        message: dict[str, int] = json.loads(self._socket.recv(_LONGEST_JOB))  # no JSON: the server has ended
        if "code" in message:
            self._codes[message["pid"]] = message["code"]
        return message

    def close(self) -> None:
        """End the server, which kills its processes."""
        self._socket.close()
        assert self._server.wait(timeout=30) == 0


def _serve() -> dict[str, Any] | None:
    """Import, then fork for every job; returns the job in a child, None at the end of the server."""
    control = socket.socket(fileno=int(sys.argv[1]))
    sys.path.pop(0)  # the folder of this file
    for name in sys.argv[2:]:
        importlib.import_module(name)
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [path for path in sys.path if path not in given]
    gc.collect()
    gc.freeze()  # the children share these pages until one writes to them
    running: dict[int, int] = {}  # pidfd -> process
    while True:
        watched: list[socket.socket | int] = [control, *running]
        ready, _, _ = select.select(watched, [], [])
        for ended in [one for one in ready if isinstance(one, int)]:
            os.close(ended)
            pid = running.pop(ended)
            _, status = os.waitpid(pid, 0)
            with suppress(BrokenPipeError):
                control.send(json.dumps({"pid": pid, "code": os.waitstatus_to_exitcode(status)}).encode())
        if control in ready:
            content, streams, _, _ = socket.recv_fds(control, _LONGEST_JOB, 2)
            if not content:  # the parent has closed the socket, or has ended
                for pid in running.values():
                    os.kill(pid, signal.SIGKILL)
                return None
            threads = len(list(Path("/proc/self/task").iterdir()))
            assert threads == 1, f"{threads} threads: a fork is not safe"
            child = os.fork()
            if child == 0:
                job: dict[str, Any] = json.loads(content)
                _settle(job, streams, control, list(running))
                return job
            for stream in streams:
                os.close(stream)
            running[os.pidfd_open(child)] = child


def _settle(job: dict[str, Any], streams: list[int], control: socket.socket, others: list[int]) -> None:
    """Set the streams, folder, environment, session and path of a job, and report the child's pid."""
    for stream, target in zip(streams, (1, 2), strict=True):
        os.dup2(stream, target)
        os.close(stream)
    for descriptor in others:
        os.close(descriptor)
    if job["session"]:
        os.setsid()
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    first, *rest = job["words"]
    own = {"-c": "", "-m": job["cwd"]}.get(first, str(Path(first).parent))
    sys.path[:0] = [own, *filter(None, job["env"].get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = rest if first in ("-c", "-m") else [first, *rest]
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
    control.send(json.dumps({"pid": os.getpid()}).encode())
    control.close()


def _run(words: list[str]) -> None:
    first, second = words[0], words[1] if len(words) > 1 else ""
    if first == "-m":
        runpy.run_module(second, run_name="__main__", alter_sys=True)
        return
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    if first == "-c":
        exec(compile(second, "<string>", "exec"), main.__dict__)
        return
    main.__file__ = first
    exec(compile(Path(first).read_bytes(), first, "exec"), main.__dict__)


if __name__ == "__main__" and (job := _serve()) is not None:
    _run(job["words"])
