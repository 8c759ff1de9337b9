"""Requests to a run: stop, save, validate; by signal, file or clock."""

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
"""Files in the run folder; their content is ignored."""
LOOK_S = 1.0
"""Least time between two looks for the files, by rank 0 only: a shared disk may be slow."""
UNMEASURED_RATIO, UNMEASURED_MAX_S = 0.1, 300.0
"""Estimate of the first save: a share of the time limit, and its upper bound."""
SAFETY = 2.0
"""Time left for a save and the step before it, as a multiple of the longest so far."""


class Controls:
    """Requests to this rank; the ranks agree on them at the end of a step.

    Args:
        folder: The run folder, where rank 0 looks for files. Removes a STOP that is older than this command.
        stop: Signals of this rank.
        world: This rank among all.
        max_minutes: Time limit of the command by rank 0's clock, effective after its first step; None for no limit.
    """

    def __init__(self, folder: Path, stop: StopSignal, world: World, *, max_minutes: float | None = None) -> None:
        self._folder, self._stop, self._world = folder, stop, world
        self._limit_s = None if max_minutes is None else 60.0 * max_minutes
        self._found: set[str] = set()
        self._stuck: set[str] = set()
        self._looked_s = time.monotonic() - LOOK_S
        self._save_s: float | None = None
        self._last_reason: str | None = None  # the file STOP is gone when the run has ended
        self._steps_s: deque[float] = deque(maxlen=8)
        if world.is_main:
            self._forget_old_stop()

    def _forget_old_stop(self) -> None:
        """Remove a STOP from before this command: the user wants the run to resume."""
        path = self._folder / STOP
        try:
            old = time.time() - path.stat().st_mtime > self._stop.age_s
        except OSError:
            return
        if old:
            self._remove(STOP)
            logger.info("removed %s: it is older than this command", path)

    def requests(self) -> Requests:
        """Requests to this rank now; at a boundary between steps or batches."""
        if not self._world.is_main:
            return Requests(stop=self._stop.requested is not None)
        self._look()
        reason = self._stop_reason()
        self._last_reason = reason or self._last_reason
        return Requests(stop=reason is not None, save=SAVE in self._found, evaluate=EVAL in self._found)

    @property
    def reason(self) -> str:
        """Why this rank stops, in words."""
        return self._stop_reason() or self._last_reason or "another rank was asked to stop"

    def acknowledge(self, requests: Requests) -> None:
        """Delete the files of handled requests, on rank 0."""
        asked = {STOP: requests.stop, SAVE: requests.save, EVAL: requests.evaluate}
        if self._world.is_main:
            for name in [name for name in asked if asked[name] and name in self._found]:
                self._remove(name)

    def stepped(self, seconds: float) -> None:
        """Record the duration of a step."""
        self._steps_s.append(seconds)

    def saved(self, seconds: float) -> None:
        """Record the duration of a save."""
        self._save_s = max(seconds, self._save_s or 0.0)

    def _stop_reason(self) -> str | None:
        if self._stop.requested is not None:
            return self._stop.requested
        if STOP in self._found:
            return f"the file {STOP} in the run folder"
        # Not before the first step: with a limit shorter than the start the run would never advance.
        limit_s = self._limit_s if self._steps_s else None
        if limit_s is not None and self._stop.age_s + self._needed_s(limit_s) >= limit_s:
            return f"--max-minutes {limit_s / 60.0:g}"
        return None

    def _needed_s(self, limit_s: float) -> float:
        """Time to reserve for one more step and the save after it."""
        save_s = min(UNMEASURED_RATIO * limit_s, UNMEASURED_MAX_S) if self._save_s is None else SAFETY * self._save_s
        return save_s + SAFETY * max(self._steps_s)

    def _look(self) -> None:
        now_s = time.monotonic()
        if now_s - self._looked_s >= LOOK_S:
            self._looked_s = now_s
            # Path.exists would end the run on a moment's failure of a shared disk (ESTALE, EIO).
            found = {name for name in (STOP, SAVE, EVAL) if os.path.exists(self._folder / name)}  # noqa: PTH110
            self._found = found - self._stuck

    def _remove(self, name: str) -> None:
        self._found.discard(name)
        try:
            (self._folder / name).unlink(missing_ok=True)
        except OSError as error:
            self._stuck.add(name)  # not handled again at every step
            path = self._folder / name
            logger.warning("%s cannot be removed (%s); it is ignored from now on", path, error.strerror)
