"""slurm/train.sbatch with fakes of srun and scontrol: the processes that it starts, and when it requeues."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from inheritune_ds.distributed.signals import StopSignal
from inheritune_ds.distributed.world import World
from inheritune_ds.training.requests import Controls

REPOSITORY = Path(__file__).parents[1]
SRUN = """#!{python}
import json, os, pathlib, signal, sys, time
here = pathlib.Path.cwd()
(here / "srun.json").write_text(json.dumps({{"argv": sys.argv[1:], "environ": dict(os.environ)}}))
stopped = []
signal.signal(signal.SIGUSR1, lambda *_: stopped.append(1))
run = here / "runs" / "quickstart"
run.mkdir(parents=True, exist_ok=True)
state = os.environ["STATE"]
if state == "until USR1":
    (here / "ready").touch()
    deadline = time.monotonic() + 30
    while not stopped and time.monotonic() < deadline:
        time.sleep(0.01)
    state = "requeue"
if state:
    (run / "status.json").write_text(json.dumps({{"state": state, "step": 3, "reason": os.environ.get("REASON", "")}}))
sys.exit(int(os.environ.get("CODE", "0")))
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >>requeued; fi
"""


@pytest.fixture
def batch(tmp_path: Path) -> dict[str, str]:
    stand_ins = {
        "srun": SRUN.format(python=sys.executable),
        "scontrol": SCONTROL,
        "sleep": "#!/bin/sh\n",  # the script waits after a requeue for SLURM to end it
    }
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in stand_ins.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    # the script puts its python's folder first on the PATH: so the stand-ins lie beside a python
    python = commands / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return {
        **os.environ,
        "PYTHON": str(python),
        "RECIPE": "quickstart",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "70007",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_CPUS_PER_TASK": "6",
    }


def start(batch: dict[str, str], *arguments: str, **extra: str) -> subprocess.Popen[str]:
    line = ["bash", str(REPOSITORY / "slurm" / "train.sbatch"), *arguments]
    return subprocess.Popen(line, env={**batch, **extra}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def wait_until_ready(folder: Path) -> None:
    deadline = time.monotonic() + 30
    while not (folder / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_sbatch_starts_python_as_the_task_with_the_rendezvous_exported(batch: dict[str, str], tmp_path: Path) -> None:
    code, output = end(start(batch, "seed=7", STATE="finished"))
    assert code == 0, output
    seen = json.loads((tmp_path / "srun.json").read_text())
    assert seen["argv"] == [
        "--kill-on-bad-exit=1",
        batch["PYTHON"],
        "train.py",
        *("--recipe", "quickstart", "--deepspeed_config", "ds_configs/zero1.json", "seed=7"),
    ]
    rendezvous = {name: seen["environ"][name] for name in ("MASTER_ADDR", "SRUN_CPUS_PER_TASK")}
    assert rendezvous == {"MASTER_ADDR": "node7", "SRUN_CPUS_PER_TASK": "6"}
    assert "runs/quickstart/status.json: finished, srun ended with 0" in output
    assert not (tmp_path / "requeued").exists()


def test_sbatch_forwards_the_signal_to_the_ranks_and_requeues(batch: dict[str, str], tmp_path: Path) -> None:
    process = start(batch, STATE="until USR1")
    wait_until_ready(tmp_path)
    process.send_signal(signal.SIGUSR1)
    code, output = end(process)
    assert code == 0, output
    assert (tmp_path / "requeued").read_text() == "requeue 70007\n"


@pytest.mark.parametrize("state", ["failed", "finished", "running", ""])
def test_sbatch_does_not_requeue_other_states(batch: dict[str, str], tmp_path: Path, state: str) -> None:
    old = tmp_path / "runs" / "quickstart" / "status.json"
    old.parent.mkdir(parents=True)
    old.write_text('{"state": "requeue"}')  # of an earlier start
    code, output = end(start(batch, STATE=state, CODE="11"))
    assert code == 11, output
    assert f"status.json: {state or 'not written by this start'}, srun ended with 11" in output
    assert not (tmp_path / "requeued").exists()


def test_sbatch_does_not_requeue_after_a_stop_file(batch: dict[str, str], tmp_path: Path) -> None:
    asked = Controls(tmp_path, StopSignal(), World(0, 1, 0, 1, "single"))
    (tmp_path / "STOP").touch()
    assert asked.requests().stop
    _, output = end(start(batch, STATE="requeue", REASON=f"{asked.reason}: saved at step 3"))
    assert "runs/quickstart/status.json: stopped by hand, srun ended with 0" in output
    assert not (tmp_path / "requeued").exists()


def test_sbatch_does_not_requeue_after_scancel(batch: dict[str, str], tmp_path: Path) -> None:
    process = start(batch, STATE="until USR1")
    wait_until_ready(tmp_path)
    process.send_signal(signal.SIGTERM)  # scancel: to the batch shell and, here by USR1, to the ranks
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    assert "requeue, srun ended with 0" in end(process)[1]
    assert not (tmp_path / "requeued").exists()


def test_sbatch_reports_a_wrong_recipe_before_it_starts(batch: dict[str, str], tmp_path: Path) -> None:
    code, output = end(start(batch, RECIPE="quikstart", STATE="finished"))
    assert code == 1
    assert "quikstart" in output
    assert "did you mean quickstart?" in output
    assert not (tmp_path / "srun.json").exists()
