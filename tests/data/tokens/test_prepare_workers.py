import multiprocessing
import os
import re
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inheritune_ds.cli import main
from inheritune_ds.data.tokens import workers, writer
from inheritune_ds.data.tokens.encoder import TextEncoder
from inheritune_ds.data.tokens.prepare import prepare
from inheritune_ds.data.tokens.shards import ShardWriter
from inheritune_ds.data.tokens.tokenizer import backend_of, load_tokenizer
from inheritune_ds.errors import MachineError
from tests.data.prepared import END, files_below, make_corpus, make_texts, names_in, recipe_file
from tests.data.preparer import Preparer, check_result, make_recipe
from tests.warm_python import WarmPython


@pytest.fixture
def small_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are started at once, and get many jobs."""
    monkeypatch.setattr(writer, "JOB_CHARACTERS", 2000)
    monkeypatch.setattr(workers, "JOBS_HERE", 1)


@pytest.mark.launch
@pytest.mark.usefixtures("small_jobs")
def test_any_number_of_workers_makes_the_same_files(tmp_path: Path, bpe: str) -> None:
    corpus = make_corpus(tmp_path, [*make_texts(400), *make_texts(3, words=2000)])
    found = []
    for count in (1, 2, 3):
        tokens = prepare(corpus, bpe, tmp_path / f"cache{count}", workers=count, shard_tokens=1000)
        found.append(files_below(tokens.folder))
    assert len(found[0]) > 10
    assert found[0] == found[1] == found[2]
    assert multiprocessing.active_children() == []


@pytest.mark.launch
@pytest.mark.usefixtures("small_jobs")
def test_prepare_exits_if_a_worker_is_killed_and_resumes(
    tmp_path: Path, bpe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = make_corpus(tmp_path, make_texts(600))
    recipe = recipe_file(tmp_path, corpus, bpe)
    expected = files_below(prepare(corpus, bpe, tmp_path / "whole").folder)
    command = ["prepare", "--recipe", str(recipe), "--cache-dir", str(tmp_path / "cache"), "--workers", "2"]
    append, documents = ShardWriter.append, iter(range(10_000))

    def kill_one(self: ShardWriter, ids: Any) -> bool:
        if next(documents) == 200:
            pid = multiprocessing.active_children()[0].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        return append(self, ids)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", kill_one)
        assert main(command) == MachineError.exit_code == 10
    problem, action = capsys.readouterr().err.splitlines()
    assert problem == "inheritune-ds: error: a tokenizer worker process died (exit code -9)"
    assert action.startswith("  do: look for an out-of-memory kill (dmesg), and rerun the same command with fewer")
    assert multiprocessing.active_children() == []
    assert main(command) == 0
    check_result(tmp_path / "cache", expected)


@pytest.fixture
def encoder(bpe: str) -> tuple[TextEncoder, tuple[str, int]]:
    definition = backend_of(load_tokenizer(bpe)).to_str(), END
    return TextEncoder(*definition), definition


@pytest.mark.launch
def test_pool_returns_jobs_in_order(encoder: tuple[TextEncoder, tuple[str, int]]) -> None:
    texts = [[text] for text in make_texts(60, words=5)]
    texts[20] = make_texts(300)  # takes longer than those behind it
    taken = 0

    def jobs() -> Iterator[list[str]]:
        nonlocal taken
        for taken, job in enumerate(texts, 1):  # noqa: B007 - looked at below
            yield job

    with workers.EncoderPool(*encoder, workers=2) as pool:
        for number, (job, ids) in enumerate(zip(texts, pool.encode(jobs()), strict=True), 1):
            assert taken - number <= 4
            assert all(np.array_equal(*pair) for pair in zip(ids, encoder[0].encode(job), strict=True))


@pytest.mark.launch
def test_pool_reuses_workers_after_jobs_are_dropped(encoder: tuple[TextEncoder, tuple[str, int]]) -> None:
    with workers.EncoderPool(*encoder, workers=2) as pool:
        for number, _ in enumerate(pool.encode(make_texts(20) for _ in range(50))):
            if number == workers.JOBS_HERE + 3:
                break
        ((found,),) = pool.encode([["a cat"]])
    assert np.array_equal(found, encoder[0].encode(["a cat"])[0])
    assert multiprocessing.active_children() == []


@pytest.mark.launch
def test_pool_reports_a_dead_worker_to_every_job(encoder: tuple[TextEncoder, tuple[str, int]]) -> None:
    """The thread of a dead worker takes the next job, and must not wait for the worker that another thread has."""
    jobs = [make_texts(200) for _ in range(3 * workers.JOBS_HERE)]
    message = r"worker process died \(exit code -9\)"
    with workers.EncoderPool(*encoder, workers=2) as pool, pytest.raises(MachineError, match=message):  # noqa: PT012
        for _ in pool.encode(jobs):
            for worker in multiprocessing.active_children()[:1]:
                assert worker.pid is not None
                os.kill(worker.pid, signal.SIGKILL)
    assert multiprocessing.active_children() == []


@pytest.mark.launch
def test_pool_detects_the_death_of_a_worker_that_sends(
    encoder: tuple[TextEncoder, tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ids are more than a pipe holds, so the worker is killed before it has sent them all."""
    jobs = [["a cat"]] * workers.JOBS_HERE + [["a cat " * 500_000]]
    receive = Connection.recv

    def kill_and_receive(self: Any) -> Any:
        assert self.poll(60)
        (worker,) = multiprocessing.active_children()
        worker.kill()
        return receive(self)

    monkeypatch.setattr(Connection, "recv", kill_and_receive)
    with workers.EncoderPool(*encoder, workers=2) as pool, pytest.raises(MachineError, match="worker process died"):
        list(pool.encode(jobs))


@pytest.mark.slow
@pytest.mark.launch
def test_of_two_concurrent_preparations_one_works_and_the_other_reuses_its_result(
    tmp_path: Path, bpe: str, warm: WarmPython
) -> None:
    preparer = Preparer(warm, tmp_path, make_recipe(tmp_path, bpe, trained=False))
    running = {name: preparer.start(tmp_path / "cache", name) for name in ("one", "other")}
    found = [preparer.end(process, name) for name, process in running.items()]
    assert [attempt.code for attempt in found] == [0, 0], found
    worked, waited = sorted(found, key=lambda attempt: "waiting" in attempt.output)
    assert (worked.tokens > 0, waited.tokens) == (True, 0)
    waiting, *table = waited.output.splitlines()
    assert re.fullmatch(r"another process fills .*\.partial; waiting for it", waiting)
    assert table == [line for line in worked.output.splitlines() if not line.startswith("WARNING: ")]
    alone = preparer.run(tmp_path / "alone")
    assert alone.tokens == worked.tokens
    (name,) = names_in(tmp_path / "alone" / "tokens")
    check_result(tmp_path / "cache", files_below(tmp_path / "alone" / "tokens" / name))
