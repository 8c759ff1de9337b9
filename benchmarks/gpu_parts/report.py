"""Findings of one part of the GPU check: figures, bars, lines; written at once."""

from pathlib import Path
from typing import Any

from inheritune_ds.storage.files import read_json, write_json

RUNNING, OK, MISSED, FAILED, SKIPPED = "running", "ok", "missed", "failed", "skipped"
"""States of a part. A bar was missed, or the part could not be made, or there was nothing to make it with."""


class Report:
    """Findings of a part, written to a JSON file at every change: they survive a kill of its process.

    The keys that the file has already are kept. `missing` lists the cases that are not done. In a rehearsal, bars on
    speed and memory are shown but not judged.
    """

    def __init__(self, path: Path, *, rehearsal: bool) -> None:
        self._path, self._rehearsal = path, rehearsal
        self._head: dict[str, Any] = read_json(path) or {}
        self._missing: list[str] = []
        self._figures: dict[str, Any] = {}
        self._bars: dict[str, dict[str, Any]] = {}
        self._lines: list[str] = []
        self._status, self._reason = RUNNING, ""
        self._write()

    def expect(self, *cases: str) -> None:
        """Announce cases, in their order."""
        self._missing += cases
        self._write()

    def done(self, *cases: str) -> None:
        """Count announced cases as done."""
        self._missing = [case for case in self._missing if case not in cases]
        self._write()

    def figure(self, name: str, value: Any) -> None:
        """Keep a figure (anything JSON holds) under a name; a later one of the same name takes its place."""
        self._figures[name] = value
        self._write()

    def line(self, text: str) -> None:
        """Keep a line for people, and print it."""
        print(text, flush=True)
        self._lines.append(text)
        self._write()

    def bar(
        self,
        name: str,
        value: float | None,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        of_gpu: bool = True,
    ) -> None:
        """Judge a figure against a promise; a later value of the same name replaces it.

        Without a value nothing is judged. A rehearsal does not judge a bar `of_gpu`.
        """
        assert (at_least is None) != (at_most is None)
        if value is None or (of_gpu and self._rehearsal):
            verdict = "not judged"
        else:
            met = value >= at_least if at_least is not None else value <= at_most  # type: ignore[operator]
            verdict = "met" if met else MISSED
        limit = {"at_least": at_least} if at_least is not None else {"at_most": at_most}
        self._bars[name] = {"value": value, **limit, "verdict": verdict}
        self._write()

    def skip(self, reason: str) -> None:
        """Say that there is nothing to make this part with."""
        self._status, self._reason = SKIPPED, reason
        self._write()

    def fail(self, reason: str) -> None:
        """Say why the part could not be made."""
        self._status, self._reason = FAILED, reason
        self._write()

    def end(self) -> None:
        """Settle the state, if it is not settled yet."""
        if self._status == RUNNING:
            missed = any(bar["verdict"] == MISSED for bar in self._bars.values())
            self._status = MISSED if missed else OK
        self._write()

    def _write(self) -> None:
        found = {"status": self._status, "reason": self._reason, "missing": self._missing, "bars": self._bars}
        write_json(self._path, {**self._head, **found, "lines": self._lines, "figures": self._figures})


def bar_words(name: str, bar: dict[str, Any]) -> str:
    """One bar for people, such as `MFU 0.571 (at least 0.55: met)`."""
    value = "unknown" if bar["value"] is None else f"{bar['value']:.4g}"
    side, limit = ("at least", bar["at_least"]) if "at_least" in bar else ("at most", bar["at_most"])
    return f"{name} {value} ({side} {limit:g}: {bar['verdict']})"
