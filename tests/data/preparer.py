"""Processes of `inheritune-ds prepare` that can be killed, and their corpora."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from inheritune_ds.config.corpus import Filters, TokensSource
from tests.data.prepared import (
    END,
    TRAINED,
    corpus_of,
    files_below,
    files_source,
    make_texts,
    names_in,
    recipe_file,
    write_jsonl,
)
from tests.launching import environment
from tests.warm_python import WarmProcess, WarmPython

DRIVER = Path(__file__).with_name("drive_prepare.py")


class Attempt(NamedTuple):
    """Result of a process: exit code (negative for a signal), steps taken, tokens written."""

    code: int
    steps: int
    tokens: int
    seconds: float
    output: str


class Preparer:
    """Runs the command, each time in a new process with its own workers."""

    def __init__(self, warm: WarmPython, folder: Path, recipe: Path) -> None:
        self._warm, self._folder, self._recipe = warm, folder, recipe

    def run(self, cache: Path, *, die_at: int | None = None, die_after_s: float | None = None) -> Attempt:
        """Run once, to the end or until it is killed: at its step `die_at` or after `die_after_s` seconds."""
        began_s, process = time.monotonic(), self.start(cache, die_at=die_at)
        if die_after_s is not None:
            time.sleep(die_after_s)
            process.kill()
        return self.end(process, began_s=began_s)

    def start(self, cache: Path, name: str = "run", *, die_at: int | None = None) -> WarmProcess:
        """Start it in a session of its own; `name` is that of its log, if several run at once."""
        marks = self._folder / f"{name}.marks"
        marks.write_bytes(bytes(16))
        arguments = ["prepare", "--recipe", str(self._recipe), "--cache-dir", str(cache), "--workers", "2"]
        words = [str(DRIVER), json.dumps({"arguments": arguments, "die_at": die_at, "marks": str(marks)})]
        with (self._folder / f"{name}.log").open("w") as log:
            return self._warm.start(words, cwd=self._folder, env=environment(), stdout=log, start_new_session=True)

    def end(self, process: WarmProcess, name: str = "run", *, began_s: float = 0.0) -> Attempt:
        """Wait for its end, and for that of its workers."""
        code = process.wait(timeout=250)
        seconds = time.monotonic() - began_s
        _wait_until_gone(process.pid)
        steps, tokens = struct.unpack("<qq", (self._folder / f"{name}.marks").read_bytes())
        return Attempt(code, steps, tokens, seconds, (self._folder / f"{name}.log").read_text())


def _wait_until_gone(session: int) -> None:
    """Fail unless every process of a session ends within two seconds."""
    deadline_s = time.monotonic() + 2.0
    while left := [pid for pid in _processes() if _session_of(pid) == session]:
        assert time.monotonic() < deadline_s, f"still alive after a kill: {left}"
        time.sleep(0.02)


def _processes() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())


def _session_of(pid: int) -> int:
    """Session of a living process; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[3])


def make_recipe(folder: Path, bpe: str, *, trained: bool) -> Path:
    """A recipe of three sources with duplicates, empty and filtered documents and an evaluation set."""
    texts = make_texts(1500, seed=1, words=60)
    long_one = " ".join(make_texts(300, seed=3, words=30))
    write_jsonl(folder / "first.jsonl", [*texts, *texts[:70], "", "short", long_one[:9000]])
    others = make_texts(1200, seed=2, words=60)
    (folder / "second.txt").write_text("\n\n".join([*others, *texts[70:90], "   "]), encoding="utf-8")
    sources: list[Any] = [
        files_source(folder / "first.jsonl", filters=Filters(min_characters=10)),
        files_source(folder / "second.txt", document_separator="\n\n"),
    ]
    if not trained:
        draw = np.random.default_rng(1)
        documents = [np.append(draw.integers(1, 257, 90), END).astype("<u2") for _ in range(300)]
        np.concatenate([*documents, *documents[:10]]).tofile(folder / "third.bin")
        sources.append(TokensSource(kind="nanogpt", name="third", train=str(folder / "third.bin")))
    evaluation = files_source(write_jsonl(folder / "evaluation.jsonl", [text[:90] for text in texts[:50]]))
    corpus = corpus_of(*sources, duplicates="drop", overlap_with=[evaluation])
    return recipe_file(folder, corpus, TRAINED if trained else bpe)


def check_result(cache: Path, expected: dict[str, str]) -> None:
    """Compare all files with those of an undisturbed run."""
    (name,) = names_in(cache / "tokens")
    assert files_below(cache / "tokens" / name) == expected
