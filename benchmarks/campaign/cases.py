"""What the campaign is made of: parts, each the proof of one promise, and their cases."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
"""What a case measured; it must survive JSON."""


@dataclass(frozen=True)
class Case:
    """One trial.

    Attributes:
        name: Unique in its part; the journal knows the case by it.
        run: Gets an empty scratch folder, returns figures; raises AssertionError with the evidence if the promise is
            broken.
    """

    name: str
    run: Callable[[Path], Figures]


@dataclass(frozen=True)
class Part:
    """All trials of one promise.

    Attributes:
        name: What the command line calls it.
        point: Its number in the list of promises (docs/explanation/reliability.md).
        promise: One sentence.
        cases: The full list, cheap to build, the same at every call.
        short: Names of the cases that `make test-all` runs.
        summary: Figures of all cases that passed -> figures of the part.
    """

    name: str
    point: int
    promise: str
    cases: Callable[[], Sequence[Case]]
    short: tuple[str, ...]
    summary: Callable[[list[Figures]], Mapping[str, Any]]

    def chosen(self, *, short: bool) -> list[Case]:
        """The cases of the full or the short form.

        Raises:
            ValueError: If two cases have one name, or a name of the short form stands for none.
        """
        listed = self.cases()
        cases = {case.name: case for case in listed}
        if len(cases) != len(listed):
            raise ValueError(f"{self.name}: two cases have the same name")
        missing = [name for name in self.short if name not in cases]
        if missing:
            raise ValueError(f"{self.name}: the short form names no case: {', '.join(missing)}")
        return [cases[name] for name in (self.short if short else cases)]
