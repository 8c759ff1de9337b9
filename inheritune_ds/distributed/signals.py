"""Record SIGINT, SIGTERM, SIGUSR1 and SIGHUP, so that all ranks stop together."""

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

IMPATIENT_S = 5.0
"""A second Ctrl-C within this time exits at once."""
EXIT_INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopSignal:
    """SIGINT, SIGTERM, SIGUSR1 and SIGHUP as a request to stop.

    A signal sets `requested`; the ranks agree on it at the next boundary, save and exit together. Inside
    `interruptible`, for long work of one rank, it also raises KeyboardInterrupt. A second SIGINT within 5 s always
    exits at once; other repeated signals change nothing.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        """Name of the first signal, or the text from another rank."""
        self._interruptible = False
        self._first_interrupt_s = -math.inf
        self._made_s = time.monotonic()

    @property
    def age_s(self) -> float:
        """Seconds since the start of the command."""
        return time.monotonic() - self._made_s

    def install(self) -> None:
        """Handle the signals, except a SIGHUP that nohup ignores; only possible in the main thread."""
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    @staticmethod
    def retire() -> None:
        """Ignore the signals: all work is done, and a late one would kill the process as the interpreter ends."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def leave_from_anywhere(self) -> None:
        """Let the second SIGINT end the process also while the main thread is in C code; from the main thread.

        Python calls a handler between two instructions of the main thread only, so not in a collective that hangs. Its
        C handler writes to a wakeup descriptor at once, and a thread reads that.
        """
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        # A forked child shares the descriptor, and its Ctrl-C must not count as the second.
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
        """Let signals raise KeyboardInterrupt inside; an earlier one raises it at once."""
        self._interruptible = True
        try:
            if self.requested is not None:
                raise KeyboardInterrupt
            yield
        finally:
            self._interruptible = False

    def pass_on(self, text: str) -> None:
        """Request a stop for another rank's signal, e.g. "SIGTERM on rank 1"; from any thread."""
        if self.requested is None:
            self.requested = text
            main = threading.main_thread().ident
            if self._interruptible and main is not None:
                signal.pthread_kill(main, signal.SIGUSR1)  # interrupts its wait

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now_s = time.monotonic()
            if now_s - self._first_interrupt_s < IMPATIENT_S:
                os._exit(EXIT_INTERRUPTED)
            self._first_interrupt_s = now_s
        if self.requested is None:
            self.requested = signal.Signals(number).name
        if self._interruptible:
            self._interruptible = False  # only once: the cleanup must not be interrupted
            raise KeyboardInterrupt
