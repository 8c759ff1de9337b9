"""`inheritune-ds prepare` killed by SIGKILL at any moment: the same command goes on, and nobody can tell."""

import json
import os
import random
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import pytest

from inheritune_ds.corpus import Corpus, Filters, TokensSource, TrainedTokenizer
from inheritune_ds.data.journal import JOURNAL_FILES, NAME
from inheritune_ds.files import read_json
from tests.data.drive_prepare import SHARD_TOKENS
from tests.data.prepared import END, files_below, files_source, make_texts, names_in, recipe_file, write_jsonl

REPOSITORY = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).with_name("drive_prepare.py")
KILLS = 25
KILLS_IN_A_ROW = 5
LONGEST_DOCUMENT = 4000
"""Tokens: a shard may be longer than SHARD_TOKENS by so many."""


class Attempt(NamedTuple):
    """How a process has ended.

    Attributes:
        code: Exit code, negative for a signal.
        steps: Steps that it took.
        tokens: Tokens that it wrote.
        seconds: How long it ran.
        said: Its output.
    """

    code: int
    steps: int
    tokens: int
    seconds: float
    said: str


class Preparer:
    """Starts the command again and again, each time in a new process with workers of its own."""

    def __init__(self, folder: Path, recipe: Path) -> None:
        self._folder, self._recipe = folder, recipe

    def __enter__(self) -> Self:
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
        self._driver = subprocess.Popen(
            [sys.executable, str(DRIVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._driver.stdin is not None
        assert self._driver.stdout is not None
        self._driver.stdin.close()
        self._driver.wait(timeout=30)
        self._driver.stdout.close()

    def start(self, cache: Path, *, die_at: int | None = None, die_after_s: float | None = None) -> Attempt:
        """Run once, to the end or until it is killed; nothing of it is left alive then."""
        log, marks = self._folder / "log", self._folder / "marks"
        log.write_text("")
        marks.write_bytes(bytes(16))
        arguments = ["prepare", "--recipe", str(self._recipe), "--cache-dir", str(cache), "--workers", "2"]
        self._send({"arguments": arguments, "die_at": die_at, "log": str(log), "marks": str(marks)})
        session = self._hear()["pid"]
        begin_s = time.monotonic()
        if die_after_s is not None:
            time.sleep(die_after_s)
            os.kill(session, signal.SIGKILL)  # waited for by the driver alone, which may have done that already
        code = self._hear()["code"]
        seconds = time.monotonic() - begin_s
        _wait_until_gone(session)
        steps, tokens = struct.unpack("<qq", marks.read_bytes())
        return Attempt(code, steps, tokens, seconds, log.read_text())

    def _send(self, order: dict[str, Any]) -> None:
        assert self._driver.stdin is not None
        self._driver.stdin.write(json.dumps(order) + "\n")
        self._driver.stdin.flush()

    def _hear(self) -> dict[str, int]:
        assert self._driver.stdout is not None
        heard: dict[str, int] = json.loads(self._driver.stdout.readline())
        return heard


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


class Kept(NamedTuple):
    """What a killed process has left.

    Attributes:
        tokens: Tokens that the journal vouches for.
        shards: Path below the folder -> (inode, time of the last change) of the shards that are closed.
    """

    tokens: int
    shards: dict[str, tuple[int, int]]


def kept_in(cache: Path, scratch: Path) -> Kept:
    """Look into the folder that a killed process was filling, without changing it."""
    folders = [path for path in (cache / "tokens").glob("*") if path.is_dir()]
    if not folders:
        return Kept(0, {})
    (folder,) = folders
    manifest = read_json(folder / "manifest.json")
    state = _journal_of(folder, scratch) if manifest is None else {"finished": manifest["sources"], "current": {}}
    tokens, shards = 0, {}
    for source in [*state["finished"], *([state["current"]] if state["current"] else [])]:
        for shard in (*source["train"], *source["validation"]):
            tokens += shard["tokens"]
            if source in state["finished"] or shard["tokens"] >= SHARD_TOKENS:
                found = (folder / source["name"] / shard["file"]).stat()
                shards[f"{source['name']}/{shard['file']}"] = (found.st_ino, found.st_mtime_ns)
    return Kept(tokens, shards)


def _journal_of(folder: Path, scratch: Path) -> dict[str, Any]:
    """What was last committed, from a copy: opening the journal undoes the transaction that was under way."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    for name in JOURNAL_FILES:
        if (folder / name).exists():
            shutil.copy(folder / name, scratch / name)
    with closing(sqlite3.connect(scratch / NAME)) as database:
        try:
            rows = database.execute("SELECT document FROM state").fetchall()
        except sqlite3.OperationalError:  # killed before the table was made
            rows = []
    return json.loads(rows[0][0]) if rows else {"finished": [], "current": {}}


def make_recipe(folder: Path, bpe: str, *, trained: bool) -> Path:
    """Three sources with everything that is counted: duplicates, empty and filtered documents, an evaluation set."""
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
    corpus = Corpus(sources=sources, validation_ratio=0.2, duplicates="drop", overlap_with=[evaluation])
    return recipe_file(folder, corpus, TrainedTokenizer(vocab_size=300) if trained else bpe)


def check_result(cache: Path, expected: dict[str, str]) -> None:
    """Every file as in an undisturbed run, and nothing beside them."""
    (name,) = names_in(cache / "tokens")
    assert files_below(cache / "tokens" / name) == expected


@pytest.fixture(scope="module", params=["trained", "ready"])
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, bpe: str
) -> Iterator[tuple[Preparer, Attempt, dict[str, str]]]:
    """The command, an undisturbed run of it, and the files that this made."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = make_recipe(folder, bpe, trained=request.param == "trained")
    with Preparer(folder, recipe) as preparer:
        whole = preparer.start(folder / "whole")
        assert whole.code == 0, whole.said
        (name,) = names_in(folder / "whole" / "tokens")
        yield preparer, whole, files_below(folder / "whole" / "tokens" / name)


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.timeout(300)
def test_a_preparation_killed_at_random_moments_ends_as_an_undisturbed_one(
    tmp_path: Path, undisturbed: tuple[Preparer, Attempt, dict[str, str]]
) -> None:
    preparer, whole, expected = undisturbed
    assert len([name for name in expected if name.endswith(".bin")]) > 20
    draw = random.Random(whole.tokens)
    kills, chain = 0, 0
    while kills < (KILLS + 1) // 2:
        chain += 1
        cache = tmp_path / f"chain-{chain}"
        kept = Kept(0, {})
        for _ in range(KILLS_IN_A_ROW):
            share = draw.random() * (1 - kept.tokens / whole.tokens)
            if draw.random() < 0.5:
                attempt = preparer.start(cache, die_after_s=share * whole.seconds)
            else:
                attempt = preparer.start(cache, die_at=1 + int(share * whole.steps))
            if attempt.code == 0:
                break
            assert attempt.code == -signal.SIGKILL, attempt.said
            kills += 1
            before, kept = kept, kept_in(cache, tmp_path / "journal")
            # What was written and is not vouched for is what the next process does again.
            assert 0 <= before.tokens + attempt.tokens - kept.tokens <= SHARD_TOKENS + LONGEST_DOCUMENT
            assert before.shards.items() <= kept.shards.items(), "a finished shard was written anew"
        last = preparer.start(cache)
        assert last.code == 0, last.said
        check_result(cache, expected)
        (final,) = (cache / "tokens").iterdir()
        found = {name: (final / name).stat() for name in kept.shards}
        assert {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()} == kept.shards


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.timeout(300)
@pytest.mark.parametrize("undisturbed", ["ready"], indirect=True)
def test_a_preparation_killed_at_every_step_of_its_end_ends_as_an_undisturbed_one(
    tmp_path: Path, undisturbed: tuple[Preparer, Attempt, dict[str, str]]
) -> None:
    """The journal, the manifest, the rename and the lock: killed once before each of the last steps."""
    preparer, whole, expected = undisturbed
    cache = tmp_path / "cache"
    shards = len([name for name in expected if name.endswith(".bin")])
    attempt = preparer.start(cache, die_at=whole.steps - 6)
    deaths = 1
    for step in range(1, 40):
        if attempt.code == 0:
            break
        assert attempt.code == -signal.SIGKILL, attempt.said
        assert len(kept_in(cache, tmp_path / "journal").shards) == shards
        attempt = preparer.start(cache, die_at=step)
        deaths += attempt.code != 0
    assert attempt.code == 0, attempt.said
    assert deaths > 8
    check_result(cache, expected)
