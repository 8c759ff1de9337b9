"""End a run that hangs: write every rank's stacks, then exit every rank with code 13.

A thread of each rank watches the rank's phase. The rank that overruns writes a note to the launcher's store, which the
threads of the other ranks read; no collective is involved. Work that holds Python's lock blocks that thread, too: then
faulthandler, in a thread of the interpreter, prints the stacks a little later and ends this rank with exit code 1.
"""

import faulthandler
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from inheritune_ds.config.reliability import Reliability
from inheritune_ds.distributed.coordination import open_store
from inheritune_ds.distributed.world import World
from inheritune_ds.errors import HangError

TICK_S = 0.5
GRACE_S = 5.0
"""Faulthandler ends a rank this much later than the thread."""
LAST_WORDS_S = 5.0
"""The longest time for the note and the stacks: a disk or the store may hang."""
PART_OF: Mapping[str, str] = {"data": "step", "log": "step"}
"""Inner phases that share the limit of another."""
_NOTE, _FIRST, _READ = (f"inheritune_ds/hang{part}" for part in ("", "/first", "/read"))
_STDERR = 2


@dataclass(frozen=True)
class Hang:
    """A phase that overran its limit."""

    phase: str
    step: int
    rank: int
    host: str
    limit_s: float
    time: str
    """UTC, part of the file names."""

    @property
    def reason(self) -> str:
        """For status.json."""
        return f"hang in {self.phase} at step {self.step} on rank {self.rank} ({self.host}): over {self.limit_s:g} s"


@dataclass
class _Phase:
    name: str
    step: int
    limit_s: float
    ends_s: float


class Watchdog:
    """Watches the phases of one rank.

    Time counts while the process runs: after a suspension the thread is as late as the work, and a late tick counts as
    two at most. Faulthandler's clock also runs while a process is stopped (not while a laptop sleeps), so SIGTSTP
    (Ctrl-Z, `scontrol suspend`) cancels it first; after a SIGSTOP of more than a phase's limit it ends the process.

    With several ranks the launcher's store must exist. Stacks are written to `logs` in the run folder. `on_hang` is
    called on every rank, on a thread, with the reason and the exit code.
    """

    def __init__(
        self, reliability: Reliability, world: World, folder: Path, *, on_hang: Callable[[str, int], None]
    ) -> None:
        self._world, self._logs, self._on_hang = world, folder / "logs", on_hang
        self._limits_s = reliability.watchdog_s if reliability.watchdog else None
        # Its own connection: a waiting thread would block a shared one.
        self._store = open_store() if world.size > 1 and reliability.watchdog else None
        self._phases: list[_Phase] = []
        self._awake_s = 0.0
        self._note: Hang | None = None  # of another rank
        self._clock = threading.Lock()
        self._rings_s = float("-inf")  # faulthandler's deadline by time.monotonic
        self._leaving = False
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        if self._limits_s is not None:
            if signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL:
                signal.signal(signal.SIGTSTP, self._suspend)
            self._start("watchdog", self._watch)
            if self._store is not None:
                self._start("watchdog-store", self._listen)

    def _start(self, name: str, work: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=work, name=name, daemon=True))
        self._threads[-1].start()

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """Watch a phase of `reliability.watchdog_s` or PART_OF; time in an inner phase does not count for the outer."""
        if self._limits_s is None:
            yield
            return
        outer = next(reversed(self._phases), None)
        begun_s, limit_s = self._awake_s, self._limits_s[PART_OF.get(name, name)]
        # The count of the last tick may lag behind by one.
        self._phases.append(_Phase(name, step, limit_s, begun_s + TICK_S + limit_s))
        self._set_clock(within_s=TICK_S)  # work that holds Python's lock would block a tick
        try:
            yield
        finally:
            if outer is not None:
                outer.ends_s += self._awake_s - begun_s
            self._phases.pop()
            if outer is not None:
                self._set_clock(within_s=TICK_S)

    def _suspend(self, _number: int, _frame: FrameType | None) -> None:
        """Stop like the default handler; the next phase or tick sets faulthandler's clock again."""
        self._cancel_clock()
        os.kill(os.getpid(), signal.SIGSTOP)

    def _cancel_clock(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._rings_s = float("-inf")

    def _set_clock(self, *, within_s: float = 0.0) -> None:
        """Set faulthandler's clock for the innermost phase, unless it is right to `within_s`: 40 microseconds."""
        with self._clock:
            if self._leaving or self._closed.is_set():
                return
            phase = next(reversed(self._phases), None)
            if phase is None:
                self._cancel_clock()
                return
            after_s = max(phase.ends_s - self._awake_s, 0.0) + GRACE_S
            rings_s = time.monotonic() + after_s
            if abs(rings_s - self._rings_s) >= within_s:
                faulthandler.dump_traceback_later(after_s, exit=True, file=_STDERR)
                self._rings_s = rings_s

    def close(self) -> None:
        """End the watch before the ranks exit; from the main thread."""
        self._closed.set()
        for thread in self._threads:
            thread.join(TICK_S + LAST_WORDS_S)
        if self._threads:
            faulthandler.cancel_dump_traceback_later()
            if signal.getsignal(signal.SIGTSTP) == self._suspend:
                signal.signal(signal.SIGTSTP, signal.SIG_DFL)

    def _watch(self) -> None:
        before_s = time.monotonic()
        while not self._closed.wait(TICK_S):
            now_s = time.monotonic()
            self._awake_s += min(now_s - before_s, 2 * TICK_S)
            before_s = now_s
            if self._note is not None:
                self._leave(self._note)
            phase = next(reversed(self._phases), None)
            if phase is not None and phase.ends_s < self._awake_s:
                self._leave(self._hang(phase))
            self._set_clock()

    def _hang(self, phase: _Phase) -> Hang:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        return Hang(phase.name, phase.step, self._world.rank, socket.gethostname(), phase.limit_s, stamp)

    def _listen(self) -> None:
        """Wait for another rank's note, on a thread: a store without its network may not answer."""
        assert self._store is not None
        with suppress(RuntimeError):  # torch's: the store has ended with rank 0; this rank's limits remain
            while not self._closed.wait(2 * TICK_S):
                if self._store.check([_NOTE]):
                    self._note = Hang(**json.loads(self._store.get(_NOTE)))
                    return

    def _leave(self, hang: Hang) -> None:
        """Exit the process, after the last words or LAST_WORDS_S."""
        with self._clock:
            self._leaving = True
            faulthandler.dump_traceback_later(LAST_WORDS_S + GRACE_S, exit=True, file=_STDERR)
        words = threading.Thread(target=self._last_words, args=(hang,), daemon=True)
        words.start()
        words.join(LAST_WORDS_S)
        os._exit(HangError.exit_code)

    def _last_words(self, hang: Hang) -> None:
        own = hang.rank == self._world.rank
        if own and self._store is not None:
            with suppress(RuntimeError):
                if self._store.add(_FIRST, 1) == 1:  # ranks that overrun at the same moment write one note
                    self._store.set(_NOTE, json.dumps(asdict(hang)))
        if own:
            error = HangError(
                hang.reason,
                allowed=f"reliability.watchdog_s.{PART_OF.get(hang.phase, hang.phase)}: {hang.limit_s:g}",
                action=f"look at the stacks of every rank in {self._logs}; rerun the same command to resume from the "
                "newest checkpoint; raise the limit in the DeepSpeed config if the phase only takes that long",
            )
            with suppress(OSError):  # nobody reads it, or its disk is full
                os.write(_STDERR, f"inheritune-ds: error: {error}\n".encode())  # the stream may be locked
        with suppress(OSError):
            self._write_stacks(hang)
        self._on_hang(hang.reason, HangError.exit_code)
        self._wait_for_other_ranks()

    def _write_stacks(self, hang: Hang) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        path = self._logs / f"hang-{hang.time}-rank-{self._world.rank:05d}.txt"
        phase = next(reversed(self._phases), None)
        here = f"{phase.name} at step {phase.step}" if phase is not None else "no watched phase"
        names = [f"  {thread.ident or 0:#018x} {thread.name}" for thread in threading.enumerate()]
        place = f"rank {self._world.rank} on {socket.gethostname()} is in {here}"
        with path.open("w", encoding="utf-8") as stream:
            stream.write("\n".join([hang.reason, place, "threads:", *names, "", ""]))
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)
            stream.flush()
            os.fsync(stream.fileno())

    def _wait_for_other_ranks(self) -> None:
        """Exit at the same moment: the end of one rank closes connections, which may end another."""
        if self._store is None:
            return
        with suppress(RuntimeError):
            self._store.add(_READ, 1)
            while self._store.add(_READ, 0) < self._world.size:
                time.sleep(TICK_S / 10)
