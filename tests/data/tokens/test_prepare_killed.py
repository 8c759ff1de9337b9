import json
import random
import shutil
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from inheritune_ds.data.tokens.journal import JOURNAL_FILES, NAME
from inheritune_ds.storage.files import read_json
from tests.data.drive_prepare import SHARD_TOKENS
from tests.data.prepared import files_below, names_in
from tests.data.preparer import Attempt, Preparer, check_result, make_recipe
from tests.warm_python import WarmPython

KILLS = 25
KILLS_IN_A_ROW = 5
LONGEST_DOCUMENT = 4000
"""In tokens: a shard may exceed SHARD_TOKENS by this."""


class Kept(NamedTuple):
    """Tokens in the journal of a killed process, and (inode, mtime) of its closed shards by path."""

    tokens: int
    shards: dict[str, tuple[int, int]]


def kept_in(cache: Path, scratch: Path) -> Kept:
    """Read the folder that a killed process was filling, without changing it."""
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
    """The last committed state, from a copy: opening the journal rolls back the open transaction."""
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


@pytest.fixture(scope="module", params=["trained", "ready"])
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, bpe: str, warm: WarmPython
) -> tuple[Preparer, Attempt, dict[str, str]]:
    """The command, an undisturbed run of it, and its files."""
    folder = tmp_path_factory.mktemp("undisturbed")
    preparer = Preparer(warm, folder, make_recipe(folder, bpe, trained=request.param == "trained"))
    whole = preparer.run(folder / "whole")
    assert whole.code == 0, whole.output
    (name,) = names_in(folder / "whole" / "tokens")
    return preparer, whole, files_below(folder / "whole" / "tokens" / name)


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.timeout(300)
def test_a_preparation_killed_at_random_moments_resumes_with_identical_files(
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
                attempt = preparer.run(cache, die_after_s=share * whole.seconds)
            else:
                attempt = preparer.run(cache, die_at=1 + int(share * whole.steps))
            if attempt.code == 0:
                break
            assert attempt.code == -signal.SIGKILL, attempt.output
            kills += 1
            before, kept = kept, kept_in(cache, tmp_path / "journal")
            # The next process repeats the tokens that are not in the journal.
            assert 0 <= before.tokens + attempt.tokens - kept.tokens <= SHARD_TOKENS + LONGEST_DOCUMENT
            assert before.shards.items() <= kept.shards.items(), "a finished shard was rewritten"
        last = preparer.run(cache)
        assert last.code == 0, last.output
        check_result(cache, expected)
        (final,) = (cache / "tokens").iterdir()
        found = {name: (final / name).stat() for name in kept.shards}
        assert {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()} == kept.shards


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.timeout(300)
@pytest.mark.parametrize("undisturbed", ["ready"], indirect=True)
def test_a_preparation_killed_at_every_final_step_resumes_with_identical_files(
    tmp_path: Path, undisturbed: tuple[Preparer, Attempt, dict[str, str]]
) -> None:
    """The journal, the manifest, the rename and the lock: killed once before each of the last steps."""
    preparer, whole, expected = undisturbed
    cache = tmp_path / "cache"
    shards = len([name for name in expected if name.endswith(".bin")])
    attempt = preparer.run(cache, die_at=whole.steps - 6)
    deaths = 1
    for step in range(1, 40):
        if attempt.code == 0:
            break
        assert attempt.code == -signal.SIGKILL, attempt.output
        assert len(kept_in(cache, tmp_path / "journal").shards) == shards
        attempt = preparer.run(cache, die_at=step)
        deaths += attempt.code != 0
    assert attempt.code == 0, attempt.output
    assert deaths > 7
    check_result(cache, expected)
