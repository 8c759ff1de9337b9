"""Ranks and signals: who this process is, however it was launched, and whether it was told to stop."""

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from inheritune_ds.errors import MachineError

IMPATIENT_S = 5.0
"""A second Ctrl-C within this time leaves at once."""
EXIT_INTERRUPTED = 130
_HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_START = "start with deepspeed, torchrun, srun or python; unset RANK (or SLURM_PROCID) to run a single process"
_PORTS = range(1, 2**16)
_SPINS = "2000"
"""Tens of microseconds: the time between two parallel regions of a step."""


@dataclass(frozen=True)
class World:
    """This process among all of the run.

    Attributes:
        rank: 0 to size - 1.
        size: Number of processes.
        local_rank: Position on this machine.
        local_size: Processes on this machine.
        launcher: `env` (deepspeed, torchrun), `slurm` (srun) or `single` (python alone).
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    launcher: str

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0


def detect(environ: Mapping[str, str]) -> World:
    """Read the launcher's variables: RANK (deepspeed, torchrun) before SLURM's before none.

    Source of the SLURM names: srun(1); SLURM_STEP_NUM_TASKS is the step's, SLURM_NTASKS in a batch
    shell is the job's, and SLURM_PROCID stands in the batch shell too, so the step's id decides.

    Raises:
        MachineError: If a launcher's variables are incomplete or not numbers.
    """
    if "RANK" in environ:
        rank, size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
        local = _number(environ, "LOCAL_RANK")
        # torchrun names the ranks of this machine LOCAL_WORLD_SIZE, DeepSpeed's launch.py LOCAL_SIZE
        name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environ else "LOCAL_SIZE"
        return _checked(World(rank, size, local, _number(environ, name, size), "env"))
    if "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ:
        size = _number(environ, "SLURM_STEP_NUM_TASKS")
        tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", str(size)).partition("(")[0]
        local = _number(environ, "SLURM_LOCALID")
        local_size = int(tasks) if tasks.isdecimal() else size
        return _checked(World(_number(environ, "SLURM_PROCID"), size, local, local_size, "slurm"))
    return World(0, 1, 0, 1, "single")


def _checked(world: World) -> World:
    if 0 <= world.rank < world.size and world.local_rank >= 0 and world.local_size >= 1:
        return world
    raise MachineError(
        f"the environment says rank {world.rank} of {world.size}, local rank {world.local_rank} of {world.local_size}",
        allowed=f"ranks 0 to {world.size - 1}" if world.size > 0 else "at least one rank",
        action=_START,
    )


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environ.get(name, default)
    try:
        return int(value)  # type: ignore[arg-type]  # None is a user's half-set environment
    except (TypeError, ValueError):
        raise MachineError(
            f"the environment variable {name} is {value!r}",
            allowed="a whole number",
            action=_START,
        ) from None


def export(world: World, environ: MutableMapping[str, str]) -> None:
    """Set what `deepspeed.init_distributed` reads, where the launcher has not done it.

    Without these variables DeepSpeed would look for MPI.

    Raises:
        MachineError: If the ranks' meeting point is not known, or its port is no port.
    """
    environ.update(
        RANK=str(world.rank),
        WORLD_SIZE=str(world.size),
        LOCAL_RANK=str(world.local_rank),
        LOCAL_WORLD_SIZE=str(world.local_size),
    )
    if world.launcher == "slurm":
        if "MASTER_ADDR" not in environ:  # one that is given must not depend on scontrol
            environ["MASTER_ADDR"] = _first_host(environ)
        # The job id stays the same over a requeue and differs between jobs that share a node.
        environ.setdefault("MASTER_PORT", str(10000 + _number(environ, "SLURM_JOB_ID", 0) % 50000))
    elif world.launcher == "single":
        environ.setdefault("MASTER_ADDR", "127.0.0.1")
        environ.setdefault("MASTER_PORT", str(_free_port()))
    _check_meeting_point(environ)


def _check_meeting_point(environ: Mapping[str, str]) -> None:
    if not environ.get("MASTER_ADDR"):
        raise MachineError(
            f"the environment variable MASTER_ADDR is {environ.get('MASTER_ADDR')!r}, but RANK is set",
            allowed="the host of rank 0",
            action=_START,
        )
    if _number(environ, "MASTER_PORT") not in _PORTS:
        raise MachineError(
            f"the environment variable MASTER_PORT is {environ['MASTER_PORT']!r}",
            allowed=f"{_PORTS[0]} to {_PORTS[-1]}",
            action="set it to a port that is free on the host of rank 0",
        )


def prepare_environment(environ: MutableMapping[str, str], *, kind: Literal["cuda", "cpu"]) -> None:
    """Set what torch, its extension builder, OpenMP and the hub's client read at their import.

    Args:
        environ: The environment to change; what the user has set stays.
        kind: What the run computes on.
    """
    # ninja lies beside the interpreter when the virtual environment is not activated.
    scripts = str(Path(sys.executable).parent)
    if scripts not in environ.get("PATH", "").split(os.pathsep):
        environ["PATH"] = os.pathsep.join([scripts, environ.get("PATH", "")])
    _set_threads(environ)
    if kind == "cpu":
        environ.setdefault("DS_ACCELERATOR", "cpu")  # said outright, DeepSpeed does not warn of a missing GPU
    if not sys.stderr.isatty():
        # Bars that redraw themselves fill a log file.
        environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _set_threads(environ: MutableMapping[str, str]) -> None:
    """Share the cores among the ranks of this machine, and let threads that wait for each other spin only shortly.

    On two quiet cores a step was a fifth faster with a short spin than with none (docs/performance.md); with libgomp's
    own, some milliseconds, it was up to ten times slower when another process was busy. Ranks that have more threads
    than there are cores do not spin.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = int(environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks > 1:  # one rank: torch's own choice, which knows physical cores
        environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    threads = environ.get("OMP_NUM_THREADS", "1")
    crowded = not threads.isdecimal() or ranks * int(threads) > cores
    if "OMP_WAIT_POLICY" in environ or "GOMP_SPINCOUNT" in environ:
        return
    if crowded:
        environ["OMP_WAIT_POLICY"] = "PASSIVE"
    else:
        environ["GOMP_SPINCOUNT"] = _SPINS


def _first_host(environ: Mapping[str, str]) -> str:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    if not nodes or "[" not in nodes:
        return nodes.partition(",")[0] or "127.0.0.1"
    try:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True, timeout=30
        )
        return listed.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        raise MachineError(
            f"the first host of SLURM's node list {nodes!r} cannot be found: scontrol does not answer",
            allowed="a host that every rank reaches",
            action="export MASTER_ADDR in the batch script, before srun",
        ) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class StopSignal:
    """SIGINT, SIGTERM and SIGUSR1 as a request to stop.

    A signal only sets `requested`; the ranks agree on it at the next boundary, save and leave together. Inside
    `interruptible`, long work of one rank that keeps nothing half-done, it raises KeyboardInterrupt as well. A second
    SIGINT within 5 s always leaves at once; a second one of the others changes nothing.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        """Name of the first signal, or the words that another rank passed on."""
        self._interruptible = False
        self._first_interrupt_s = -math.inf
        self._made_s = time.monotonic()

    @property
    def age_s(self) -> float:
        """Seconds since this was made, at the start of the command."""
        return time.monotonic() - self._made_s

    def install(self) -> None:
        """Take over the three signals; only possible in the main thread."""
        for number in _HEARD:
            signal.signal(number, self._handle)

    @staticmethod
    def retire() -> None:
        """Hear nothing more: everything is done, and the interpreter's end would let a late signal kill the process."""
        for number in _HEARD:
            signal.signal(number, signal.SIG_IGN)

    def leave_from_anywhere(self) -> None:
        """Let the second SIGINT end the process also while the main thread is in C code; from the main thread.

        Python calls a handler between two instructions of the main thread only, so not in a collective that never
        ends. The C handler below it writes to a wakeup descriptor at once; a thread reads there.
        """
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        # A forked child shares the descriptor, and a Ctrl-C that it hears, too, must not count as the second.
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        threading.Thread(target=self._count_interrupts, args=(reader, writer), name="interrupts", daemon=True).start()

    @staticmethod
    def _count_interrupts(reader: socket.socket, _writer: socket.socket) -> None:
        first_s = -math.inf
        while numbers := reader.recv(64):
            for _ in range(numbers.count(signal.SIGINT)):
                now_s = time.monotonic()
                if now_s - first_s < IMPATIENT_S:
                    os._exit(EXIT_INTERRUPTED)
                first_s = now_s

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let signals raise KeyboardInterrupt inside; one that came before raises it at once."""
        self._interruptible = True
        try:
            if self.requested is not None:
                raise KeyboardInterrupt
            yield
        finally:
            self._interruptible = False

    def pass_on(self, words: str) -> None:
        """Do as if a signal had come, from any thread.

        Args:
            words: What another rank was asked by, e.g. "SIGTERM on rank 1".
        """
        if self.requested is None:
            self.requested = words
            main = threading.main_thread().ident
            if self._interruptible and main is not None:
                signal.pthread_kill(main, signal.SIGUSR1)  # the handler runs there, and ends what it waits for

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now_s = time.monotonic()
            if now_s - self._first_interrupt_s < IMPATIENT_S:
                os._exit(EXIT_INTERRUPTED)
            self._first_interrupt_s = now_s
        if self.requested is None:
            self.requested = signal.Signals(number).name
        if self._interruptible:
            self._interruptible = False  # once: what cleans up after it must not be interrupted again
            raise KeyboardInterrupt
