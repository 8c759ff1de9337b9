"""Outcomes of the campaign's cases: kept in pytest's cache, written to a JSON file once a part is complete."""

import hashlib
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.campaign.part import Part
from benchmarks.record import REPOSITORY, environment, git
from inheritune_ds.storage.files import read_json, write_json

CODE = (
    "inheritune_ds",
    "benchmarks/campaign",
    "benchmarks/launch.py",
    "benchmarks/ranks.py",
    "tests/launching.py",
    "tests/tiny.py",
    "ds_configs",
    "train.py",
)
"""Everything that the outcome of a case depends on."""
_SUFFIXES = (".py", ".yaml", ".json")


def code_digest(repository: Path = REPOSITORY) -> str:
    """sha256 (hex, 16 characters) of all files of CODE: it sees uncommitted changes and ignores those of documents."""
    files = [file for name in CODE for file in (repository / name, *(repository / name).rglob("*")) if file.is_file()]
    digest = hashlib.sha256()
    for path in sorted(file for file in files if file.suffix in _SUFFIXES):
        digest.update(f"{path.relative_to(repository)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


class Results:
    """Runs cases and records outcomes: in the cache those of the present code, in `out` complete parts."""

    def __init__(self, cache: pytest.Cache, out: Path) -> None:
        self._cache, self._out = cache, out
        self._code = code_digest()

    def passed(self, part: Part) -> set[str]:
        """Names of the cases that passed with the present code."""
        return {name for name, outcome in self._outcomes(part).items() if outcome["passed"]}

    def run(self, part: Part, name: str, scratch: Path) -> None:
        """Run a case, record its outcome, and write the part's result if every case has one."""
        started_s = time.monotonic()
        try:
            outcome = {"passed": True, "figures": part.cases[name](scratch)}
        except Exception:
            self._record(part, name, {"passed": False})
            raise
        self._record(part, name, {**outcome, "seconds": round(time.monotonic() - started_s, 2)})

    def _outcomes(self, part: Part) -> dict[str, dict[str, Any]]:
        kept = self._cache.get(f"campaign/{part.name}", {})
        return kept["cases"] if kept.get("code") == self._code else {}

    def _record(self, part: Part, name: str, outcome: dict[str, Any]) -> None:
        if code_digest() != self._code:
            raise RuntimeError(f"the code changed while {part.name}-{name} ran; nothing is recorded: start again")
        outcomes = {**self._outcomes(part), name: outcome}
        self._cache.set(f"campaign/{part.name}", {"code": self._code, "cases": outcomes})
        if set(part.cases) <= set(outcomes):
            self._write(part, {case: outcomes[case] for case in part.cases})

    def _write(self, part: Part, outcomes: dict[str, dict[str, Any]]) -> None:
        passed = [outcome for outcome in outcomes.values() if outcome["passed"]]
        changes = git("status", "--porcelain", "--", *CODE)
        result = {
            "point": part.point,
            "promise": part.promise,
            "cases": len(outcomes),
            "passed": len(passed),
            "failed": [name for name, outcome in outcomes.items() if not outcome["passed"]],
            "figures": dict(part.summary([outcome["figures"] for outcome in passed])) if passed else {},
            "seconds": round(sum(outcome["seconds"] for outcome in passed), 1),
            "code": self._code,
            "changed": None if changes is None else bool(changes),
            **environment(),
            "command": f"make campaign ARGS='-k {part.name}'",
        }
        self._out.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._out, {**(read_json(self._out) or {}), part.name: result})
