"""What a campaign has done already: one line a case, so that an interrupted campaign goes on."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.record import REPOSITORY

CODE = ("inheritune_ds", "benchmarks/campaign", "ds_configs", "train.py")
"""What a case depends on."""
_ENDINGS = (".py", ".yaml", ".json")


def code_digest() -> str:
    """sha256 (hex, 16 characters) of every file that a case depends on.

    A commit does not tell it: files may have changed since, and a commit of a document changes no outcome.
    """
    digest = hashlib.sha256()
    for path in sorted(file for name in CODE for file in _files(REPOSITORY / name)):
        digest.update(f"{path.relative_to(REPOSITORY)}\0{_hash(path, path.stat().st_mtime_ns)}\n".encode())
    return digest.hexdigest()[:16]


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.suffix in _ENDINGS]


@cache
def _hash(path: Path, _changed_ns: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Journal:
    """The journal of one part.

    Args:
        path: A JSONL file; made with the first line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, entry: dict[str, Any]) -> None:
        """Append a line."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")

    def passed(self, code: str) -> dict[str, dict[str, Any]]:
        """The last line of every case that passed with this code, by name."""
        last = {entry["case"]: entry for entry in self._entries() if entry["code"] == code}
        return {name: entry for name, entry in last.items() if entry["passed"]}

    def forget(self) -> None:
        """Start anew."""
        self._path.unlink(missing_ok=True)

    def _entries(self) -> list[dict[str, Any]]:
        """All lines but one that a kill has cut short."""
        if not self._path.exists():
            return []
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
