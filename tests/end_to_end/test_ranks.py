"""Ranks without a launcher that ends them, as under srun without --kill-on-bad-exit; killed runs."""

import fcntl
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.test_runs import Launch, Recipe, Start, arguments, last_step, status, wait_for
from tests.launching import ROOT, environment, free_port, rows, srun_variables
from tests.warm_python import WarmProcess, WarmPython

pytestmark = pytest.mark.timeout(300)
Rank = subprocess.Popen[bytes] | WarmProcess
Ranks = Callable[..., list[Rank]]


@pytest.fixture
def ranks(warm: WarmPython, tmp_path: Path) -> Iterator[Ranks]:
    """Start two ranks like srun, each with its own log; no launcher ends one after the other."""
    started: list[Rank] = []

    def start(script: str, words: list[str], *, real: bool = False, **extra: str) -> list[Rank]:
        port = free_port()
        line = [str(ROOT / script), *words]
        for rank in range(2):
            environ = environment(**srun_variables(rank, 2, port), **extra)
            with (tmp_path / f"rank{rank}.log").open("wb") as log:
                started.append(
                    subprocess.Popen([sys.executable, *line], cwd=tmp_path, env=environ, stdout=log, stderr=log)
                    if real
                    else warm.start(line, cwd=tmp_path, env=environ, stdout=log)
                )
        return started

    yield start
    for process in started:
        process.kill()
        process.wait()


def log(tmp_path: Path, rank: int) -> str:
    return (tmp_path / f"rank{rank}.log").read_text()


def test_all_ranks_exit_when_rank_0_cannot_lock_the_folder(ranks: Ranks, tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = tiny_recipe()
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "status.json").write_text('{"state": "running", "step": 3}')
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        codes = [process.wait(timeout=110) for process in ranks("train.py", arguments(recipe, tmp_path))]
    assert codes == [8, 8]
    assert "another process is writing to" in log(tmp_path, 0)
    assert "inheritune-ds: rank 1: error: rank 0 has ended the run: another process is writing to" in log(tmp_path, 1)
    assert "Traceback" not in log(tmp_path, 0) + log(tmp_path, 1)
    assert status(folder) == {"state": "running", "step": 3}, "it is the other process's"


def test_all_ranks_wait_for_a_slow_export_and_exit_together(ranks: Ranks, tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = tiny_recipe()  # the driver's LIMIT_S ends groups that were not given the run's limit
    main, second = ranks("tests/end_to_end/drive_export.py", arguments(recipe, tmp_path), real=True, EXPORT_S="5")
    assert second.wait(timeout=110) == 0
    assert status(tmp_path / "runs" / "tiny")["state"] == "finished", "rank 1 exited before rank 0 was done"
    assert main.wait(timeout=10) == 0
    assert "terminate called" not in log(tmp_path, 1)


def test_all_ranks_exit_when_the_export_fails(ranks: Ranks, tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = tiny_recipe()
    started = ranks("tests/end_to_end/drive_export.py", arguments(recipe, tmp_path), EXPORT_S="2", FAIL="1")
    assert [process.wait(timeout=110) for process in started] == [12, 12]
    assert "rank 1: error: rank 0 has ended the run: planted by a test" in log(tmp_path, 1)
    assert status(tmp_path / "runs" / "tiny")["exit_code"] == 12


def test_a_rank_that_fails_alone_reports_its_cause_and_exits_at_once(
    ranks: Ranks, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    main, second = ranks("tests/end_to_end/drive_failure.py", arguments(tiny_recipe(), tmp_path))
    assert second.wait(timeout=110) == 10
    cause = "out of memory: Tried to allocate 2.00 GiB. GPU 0 is full"
    told = log(tmp_path, 1)
    assert f"inheritune-ds: rank 1: error: {cause}\n" in told
    assert "Traceback" not in told
    assert "the plan is 1.0 GiB" in told
    assert "then rerun the same command to resume from the newest checkpoint" in told
    assert main.wait(timeout=60) == 11
    assert "error: another rank has gone: " in log(tmp_path, 0)
    found = status(tmp_path / "runs" / "tiny")
    assert (found["state"], found["reason"], found["exit_code"]) == ("failed", f"rank 1: {cause}", 10)


LONG = {"training": {"seq_len": 32, "global_batch_tokens": 512, "duration": "40 steps"}}


def test_a_signal_to_one_rank_saves_and_stops_all(ranks: Ranks, tiny_recipe: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tiny"
    main, second = ranks("train.py", arguments(tiny_recipe(checkpoint={"interval_steps": 1000}, **LONG), tmp_path))
    wait_for(lambda: last_step(run) >= 1, main, tmp_path / "rank0.log")
    second.send_signal(signal.SIGTERM)
    assert [process.wait(timeout=60) for process in (main, second)] == [0, 0]
    stopped = status(run)
    assert stopped["state"] == "requeue"
    assert stopped["reason"] == f"another rank was asked to stop: saved at step {stopped['step']}"
    assert (run / "checkpoints" / f"step-{stopped['step']:08d}").is_dir()


def test_a_killed_run_resumes_from_its_newest_checkpoint(
    start: Start, launch: Launch, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "tiny"
    words = arguments(tiny_recipe(**LONG), tmp_path)
    process = start("train.py", *words)
    wait_for(lambda: last_step(run) >= 9, process, tmp_path / "run.log")
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    saved = max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*[0-9]"))
    assert saved >= 8
    assert f"(step {saved}," in launch("train.py", *words, launcher="deepspeed")
    assert status(run)["state"] == "finished"
    assert [row["step"] for row in rows(run) if "train/loss" in row] == list(range(1, 41)), "each step once"


def test_another_precision_is_refused_and_changes_nothing(
    launch: Launch, ranks: Ranks, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = tiny_recipe()
    run = tmp_path / "runs" / "tiny"
    config = tmp_path / "fp32.json"
    config.write_text(json.dumps({"bf16": {"enabled": False}}))
    launch("train.py", *arguments(recipe, tmp_path, "runs", "--deepspeed_config", str(config)))
    document = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**document, "state": "running"}))  # as if killed at the very end
    kept = {name: (run / name).read_bytes() for name in ("ds_config.resolved.json", "provenance.json", "run.json")}
    config.write_text(json.dumps({"bf16": {"enabled": True}}))
    words = arguments(recipe, tmp_path, "runs", "--deepspeed_config", str(config))
    began = time.time()
    codes = [process.wait(timeout=110) for process in ranks("train.py", words)]
    assert codes == [4, 4]
    assert "was saved in fp32, and this launch computes in bf16" in log(tmp_path, 0)
    assert {name: (run / name).read_bytes() for name in kept} == kept
    assert all(path.stat().st_mtime < began for path in (run / "checkpoints").glob("step-*/**/*"))
    assert status(run)["state"] == "failed"


def test_a_reference_that_another_process_trains_is_named(launch: Launch, tiny_recipe: Recipe, tmp_path: Path) -> None:
    parent = tiny_recipe("parent")
    recipe = tiny_recipe("child", reference={"model": f"recipe:{parent}"}, target={"select": "first:2"})
    folder = tmp_path / "runs" / "parent"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        output = launch("train.py", *arguments(recipe, tmp_path), expect=8)
    assert "child needs its reference parent, which another process is training: another process is" in output
    assert "do: rerun the same command when that process has finished" in output
    assert "name=OTHER" not in output
