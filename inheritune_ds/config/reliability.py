"""The `reliability` block of a DeepSpeed config: saving and time limits. The engine removes it for DeepSpeed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SaveErrorPolicy = Literal["continue", "stop"]
WATCHDOG_S: Mapping[str, float] = {
    "start": 1800.0,
    "first_step": 1800.0,
    "step": 600.0,
    "validation": 3600.0,
    "save": 1800.0,
    "finish": 3600.0,
}
"""Seconds after which a phase counts as hung: building the engine and resuming, the first step (which compiles), any
other step with its data and its logging, a whole validation, a save, the export."""


@dataclass(frozen=True)
class Reliability:
    """The resolved block."""

    async_save: bool = False
    """Whether training waits only for the copy of its state to host memory."""
    on_save_error: SaveErrorPolicy = "continue"
    """Whether a run continues when a checkpoint cannot be written."""
    watchdog: bool = True
    """Whether a hung phase ends the run."""
    watchdog_s: Mapping[str, float] = field(default_factory=lambda: dict(WATCHDOG_S))
    """Time limit of every phase."""

    @property
    def group_timeout_s(self) -> float:
        """Time limit of a collective: above every watchdog limit, so that the watchdog reports a hang first."""
        return max(self.watchdog_s.values()) + 120.0

    @classmethod
    def of(cls, block: Mapping[str, Any]) -> "Reliability":
        """Read a checked `reliability` block; keys that are missing, null or `auto` have their defaults."""
        given = {key: value for key, value in block.items() if value not in ("auto", None)}
        seconds = {key: value for key, value in given.pop("watchdog_s", {}).items() if value not in ("auto", None)}
        return cls(**given, watchdog_s={**WATCHDOG_S, **seconds})
