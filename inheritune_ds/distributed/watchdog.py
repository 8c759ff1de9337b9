"""Ends a run that hangs: every rank's stacks are written, then every rank leaves with exit code 13.

A thread of each rank looks at the phase that the rank is in. The rank that overruns leaves a note in the launcher's
store, which the threads of the others read, whatever their ranks are waiting for. None of this is a collective, and
nothing is joined at the end. Work that holds Python's lock keeps that thread from running, too; for it a thread of the
interpreter's own (faulthandler) waits a little longer, then prints the stacks and ends this rank with exit code 1.
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
"""How much later than the thread faulthandler ends a rank."""
LAST_WORDS_S = 5.0
"""A rank leaves after this time even if a disk or the store keeps its last words waiting."""
PART_OF: Mapping[str, str] = {"data": "step", "log": "step"}
"""Phases inside others that share their limit."""
_NOTE, _FIRST, _READ = (f"inheritune_ds/hang{part}" for part in ("", "/first", "/read"))
_STDERR = 2


@dataclass(frozen=True)
class Hang:
    """What overran.

    Attributes:
        phase: Its name.
        step: Where the run was.
        rank: Who overran.
        host: Its machine.
        limit_s: What the phase may take.
        time: When, in UTC; part of the names of the files.
    """

    phase: str
    step: int
    rank: int
    host: str
    limit_s: float
    time: str

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

    Time counts while the process runs: a suspended one comes back with its thread as late as its work, and a tick that
    came late counts as two at most. Faulthandler knows only the clock, which goes on while a process is stopped (not
    while a laptop sleeps), so a stop that announces itself (Ctrl-Z, `scontrol suspend`) calls it off before; after a
    bare SIGSTOP of longer than a phase's limit it ends the process.

    Args:
        reliability: The limit of every phase, and whether there is a watch at all.
        world: This rank among all; with several, the launcher's store must be there already.
        folder: The run folder; stacks are written to `logs` in it.
        on_hang: Told why the run ends, and the exit code; it is called on a thread, on every rank.
    """

    def __init__(
        self, reliability: Reliability, world: World, folder: Path, *, on_hang: Callable[[str, int], None]
    ) -> None:
        self._world, self._logs, self._on_hang = world, folder / "logs", on_hang
        self._limits_s = reliability.watchdog_s if reliability.watchdog else None
        # A connection of its own: a shared one would be held by any thread that waits for an answer.
        self._store = open_store() if world.size > 1 and reliability.watchdog else None
        self._phases: list[_Phase] = []
        self._awake_s = 0.0
        self._told: Hang | None = None
        self._clock = threading.Lock()
        self._rings_s = float("-inf")  # by time.monotonic; when faulthandler's clock runs out
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
        """Watch what happens inside.

        Only the innermost phase is watched, and the time in it does not count for the one around it.

        Args:
            name: start, first_step, step, validation, save or finish; data or log.
            step: Where the run is.
        """
        if self._limits_s is None:
            yield
            return
        outer = next(reversed(self._phases), None)
        begun_s, limit_s = self._awake_s, self._limits_s[PART_OF.get(name, name)]
        # The count of the last tick may lag behind by one.
        self._phases.append(_Phase(name, step, limit_s, begun_s + TICK_S + limit_s))
        self._set_clock(within_s=TICK_S)
        try:
            yield
        finally:
            if outer is not None:
                outer.ends_s += self._awake_s - begun_s
            self._phases.pop()
            if outer is not None:
                self._set_clock(within_s=TICK_S)

    def _suspend(self, _number: int, _frame: FrameType | None) -> None:
        """Stop, as without a handler; the next phase or tick after it sets faulthandler's clock again."""
        faulthandler.cancel_dump_traceback_later()
        self._rings_s = float("-inf")
        os.kill(os.getpid(), signal.SIGSTOP)

    def _set_clock(self, *, within_s: float = 0.0) -> None:
        """Set faulthandler's clock for the innermost phase, at once: work that holds Python's lock lets no tick do it.

        Setting it starts a thread, some 40 microseconds; a clock that is right to `within_s` already is left alone.
        """
        with self._clock:
            if self._leaving or self._closed.is_set():
                return
            phase = next(reversed(self._phases), None)
            if phase is None:
                faulthandler.cancel_dump_traceback_later()
                self._rings_s = float("-inf")
                return
            after_s = max(phase.ends_s - self._awake_s, 0.0) + GRACE_S
            rings_s = time.monotonic() + after_s
            if abs(rings_s - self._rings_s) >= within_s:
                faulthandler.dump_traceback_later(after_s, exit=True, file=_STDERR)
                self._rings_s = rings_s

    def close(self) -> None:
        """Watch no more, before the ranks part; from the main thread."""
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
            if self._told is not None:
                self._leave(self._told)
            phase = next(reversed(self._phases), None)
            if phase is not None and phase.ends_s < self._awake_s:
                self._leave(self._hang(phase))
            self._set_clock()

    def _hang(self, phase: _Phase) -> Hang:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        return Hang(phase.name, phase.step, self._world.rank, socket.gethostname(), phase.limit_s, stamp)

    def _listen(self) -> None:
        """Wait for another rank's note, on a thread of its own: a store without its network may not answer."""
        assert self._store is not None
        with suppress(RuntimeError):  # torch's: the store has ended with rank 0: limits of this rank's own are left
            while not self._closed.wait(2 * TICK_S):
                if self._store.check([_NOTE]):
                    self._told = Hang(**json.loads(self._store.get(_NOTE)))
                    return

    def _leave(self, hang: Hang) -> None:
        """Leave the process, after last words that must not take long."""
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
                if self._store.add(_FIRST, 1) == 1:  # those that overrun at the same moment have one note
                    self._store.set(_NOTE, json.dumps(asdict(hang)))
        if own:
            error = HangError(
                hang.reason,
                allowed=f"reliability.watchdog_s.{PART_OF.get(hang.phase, hang.phase)}: {hang.limit_s:g}",
                action=f"look at the stacks of every rank in {self._logs}; the same command goes on from the newest "
                "checkpoint; raise the limit in the DeepSpeed config if the phase only takes that long",
            )
            os.write(_STDERR, f"inheritune-ds: error: {error}\n".encode())  # the stream's lock may be taken
        with suppress(OSError):
            self._write_stacks(hang)
        self._on_hang(hang.reason, HangError.exit_code)
        self._wait_for_the_others()

    def _write_stacks(self, hang: Hang) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        path = self._logs / f"hang-{hang.time}-rank-{self._world.rank:05d}.txt"
        phase = next(reversed(self._phases), None)
        here = f"{phase.name} at step {phase.step}" if phase is not None else "no phase that is watched"
        names = [f"  {thread.ident or 0:#018x} {thread.name}" for thread in threading.enumerate()]
        head = [hang.reason, f"rank {self._world.rank} on {socket.gethostname()} is in {here}", "threads:", *names]
        with path.open("w", encoding="utf-8") as stream:
            stream.write("\n".join([*head, "", ""]))
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)
            stream.flush()
            os.fsync(stream.fileno())

    def _wait_for_the_others(self) -> None:
        """Leave at the same moment: a rank that is left first may meet a closed connection, and die of that."""
        if self._store is None:
            return
        with suppress(RuntimeError):
            self._store.add(_READ, 1)
            while self._store.add(_READ, 0) < self._world.size:
                time.sleep(TICK_S / 10)
