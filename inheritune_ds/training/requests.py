"""What a run is asked for while it trains: to stop, to save, to validate; by signal, file or clock."""

import logging
import os
import time
from collections import deque
from pathlib import Path

from inheritune_ds.checkpoints.train_state import Requests
from inheritune_ds.distributed.signals import StopSignal
from inheritune_ds.distributed.world import World

logger = logging.getLogger(__name__)

STOP, SAVE, EVAL = "STOP", "SAVE", "EVAL"
"""Files in the run folder that ask for something; what they hold does not matter."""
LOOK_S = 1.0
"""Files are looked for at most once in this time, and by rank 0 only: a shared disk may be slow."""
UNMEASURED_RATIO, UNMEASURED_MAX_S = 0.1, 300.0
"""Before the first save it is taken to last this share of the time limit, and no longer than that."""
SAFETY = 2.0
"""A save, and the step before it, may take twice as long as the longest seen."""
_STEPS = 8


class Controls:
    """What this rank is asked for; the ranks agree on it at the end of a step.

    Args:
        folder: The run folder; rank 0 looks for files there. A STOP that is older than this command is removed.
        stop: Signals of this rank.
        world: This rank among all.
        max_minutes: The command should be over this long after its start, but for its first step; None for no limit.
            Only rank 0's clock counts.
    """

    def __init__(self, folder: Path, stop: StopSignal, world: World, *, max_minutes: float | None = None) -> None:
        self._folder, self._stop, self._world = folder, stop, world
        self._limit_s = None if max_minutes is None else 60.0 * max_minutes
        self._found: set[str] = set()
        self._stuck: set[str] = set()
        self._looked_s = time.monotonic() - LOOK_S
        self._save_s: float | None = None
        self._told: str | None = None  # the file STOP is gone when the run has ended
        self._steps_s: deque[float] = deque(maxlen=_STEPS)
        if world.is_main:
            self._forget_old_stop()

    def _forget_old_stop(self) -> None:
        """Whoever gives the command again wants it to go on."""
        path = self._folder / STOP
        try:
            old = time.time() - path.stat().st_mtime > self._stop.age_s
        except OSError:
            return
        if old:
            self._remove(STOP)
            logger.info("removed %s: it is older than this command", path)

    def requests(self) -> Requests:
        """What this rank is asked for now; at a boundary between steps or batches."""
        if not self._world.is_main:
            return Requests(stop=self._stop.requested is not None)
        self._look()
        reason = self._stop_reason()
        self._told = reason or self._told
        return Requests(stop=reason is not None, save=SAVE in self._found, evaluate=EVAL in self._found)

    @property
    def reason(self) -> str:
        """Why this rank stops, in words."""
        return self._stop_reason() or self._told or "another rank was asked to stop"

    def acknowledge(self, requests: Requests) -> None:
        """Delete the files of handled requests; rank 0."""
        asked = {STOP: requests.stop, SAVE: requests.save, EVAL: requests.evaluate}
        if self._world.is_main:
            for name in [name for name in asked if asked[name] and name in self._found]:
                self._remove(name)

    def stepped(self, seconds: float) -> None:
        """Note how long a step took."""
        self._steps_s.append(seconds)

    def saved(self, seconds: float) -> None:
        """Note how long a save took."""
        self._save_s = max(seconds, self._save_s or 0.0)

    def _stop_reason(self) -> str | None:
        if self._stop.requested is not None:
            return self._stop.requested
        if STOP in self._found:
            return f"the file {STOP} in the run folder"
        # Not before the first step: a limit that is shorter than the start would otherwise lead nowhere, ever again.
        limit_s = self._limit_s if self._steps_s else None
        if limit_s is not None and self._stop.age_s + self._needed_s(limit_s) >= limit_s:
            return f"--max-minutes {limit_s / 60.0:g}"
        return None

    def _needed_s(self, limit_s: float) -> float:
        """Time that must be left for one more step and the save after it."""
        save_s = min(UNMEASURED_RATIO * limit_s, UNMEASURED_MAX_S) if self._save_s is None else SAFETY * self._save_s
        return save_s + SAFETY * max(self._steps_s)

    def _look(self) -> None:
        now_s = time.monotonic()
        if now_s - self._looked_s >= LOOK_S:
            self._looked_s = now_s
            # Path.exists would end the run when a shared disk does not answer for a moment (ESTALE, EIO).
            found = {name for name in (STOP, SAVE, EVAL) if os.path.exists(self._folder / name)}  # noqa: PTH110
            self._found = found - self._stuck

    def _remove(self, name: str) -> None:
        self._found.discard(name)
        try:
            (self._folder / name).unlink(missing_ok=True)
        except OSError as error:
            self._stuck.add(name)  # it must not be honoured at every step from now on
            path = self._folder / name
            logger.warning("%s cannot be removed (%s); it is not looked at again", path, error.strerror)
