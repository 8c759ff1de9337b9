"""Start runs from tests, and read their files."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tests.warm_python import WarmProcess, WarmPython

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = Path(sys.executable).parent
LONGEST_S = 300.0
"""The first start builds a C++ operator; pytest ends a test that hangs."""
Launcher = Literal["warm", "python", "deepspeed", "torchrun"]
IMPORTS = (
    "torch",
    "deepspeed.runtime.zero.muon.original_muon",  # compiles at import, and so imports torch's compiler
    "transformers.models.auto.modeling_auto",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "inheritune_ds.cli.train",
    "inheritune_ds.run.execute",
    "inheritune_ds.report.figures",
    "matplotlib.backends.backend_agg",
    "mpl_toolkits.mplot3d",
    "wandb",
)
"""The slow imports of a rank."""


def warm_python() -> WarmPython:
    return WarmPython(IMPORTS, environment())


def free_port() -> str:
    """A free port, so that runs beside each other do not meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def environment(**extra: str) -> dict[str, str]:
    """The environment of a launched run: a CPU, no tracker, one thread a rank, no variables of an outer launcher."""
    launcher = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "SLURM_", "COV")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(launcher)}
    return {
        **kept,
        "PATH": os.pathsep.join([str(SCRIPTS), os.environ.get("PATH", "")]),
        "DS_ACCELERATOR": "cpu",
        "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(ROOT),
        **extra,
    }


def torchrun_variables(rank: int, ranks: int, port: str) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **{key: str(value) for key, value in numbers.items()}}


def srun_variables(rank: int, ranks: int, port: str) -> dict[str, str]:
    step = {"NUM_TASKS": str(ranks), "TASKS_PER_NODE": str(ranks), "NODELIST": "localhost"}
    task = {"SLURM_JOB_ID": "4711", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {**{f"SLURM_STEP_{name}": value for name, value in step.items()}, **task, **meeting}


class WarmRanks:
    """Ranks that were forked together; the first that fails ends the others, as under a launcher."""

    def __init__(self, ranks: Sequence[WarmProcess]) -> None:
        self._ranks = ranks

    def poll(self) -> int | None:
        """Exit code of the first failed rank, 0 if all have succeeded, None otherwise."""
        codes = [rank.poll() for rank in self._ranks]
        failed = [code for code in codes if code]
        if failed:
            self.kill()
        return failed[0] if failed else None if None in codes else 0

    def wait(self, timeout: float = LONGEST_S) -> int:
        deadline_s = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline_s:
                raise subprocess.TimeoutExpired(["warm ranks"], timeout)
            time.sleep(0.01)
        for rank in self._ranks:
            rank.wait()
        return code

    def send_signal(self, number: int) -> None:
        for rank in self._ranks:
            rank.send_signal(number)

    def kill(self) -> None:
        for rank in self._ranks:
            rank.kill()


Process = subprocess.Popen[bytes] | WarmProcess | WarmRanks


def start(
    warm: WarmPython,
    folder: Path,
    script: str,
    *arguments: str,
    launcher: Launcher = "warm",
    ranks: int = 1,
    **extra: str,
) -> Process:
    """Start a script of the repository in a folder, and append its output to run.log there.

    The launcher `warm` forks the ranks, with torchrun's variables for several; other launchers are real ones. `extra`
    are variables of the environment.
    """
    words = [str(ROOT / script), *arguments]
    with (folder / "run.log").open("ab") as log:
        if launcher != "warm":
            line = [*launcher_line(launcher, ranks), *words]
            environ = environment(**extra)
            return subprocess.Popen(
                line, cwd=folder, env=environ, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        port = free_port()
        own = [torchrun_variables(rank, ranks, port) if ranks > 1 else {} for rank in range(ranks)]
        environs = [environment(**variables, **extra) for variables in own]
        started = [warm.start(words, cwd=folder, env=env, stdout=log, start_new_session=True) for env in environs]
    return started[0] if ranks == 1 else WarmRanks(started)


def launch(warm: WarmPython, folder: Path, script: str, *arguments: str, expect: int = 0, **how: Any) -> str:
    """Start like `start`, wait for the end, check the exit code and return the output."""
    log = folder / "run.log"
    before = log.stat().st_size if log.exists() else 0
    code = start(warm, folder, script, *arguments, **how).wait(timeout=LONGEST_S)
    output = log.read_bytes()[before:].decode(errors="replace")
    assert code == expect, f"exit code {code}, not {expect}\n{output[-6000:]}"
    return output


def launcher_line(launcher: Launcher, ranks: int) -> list[str]:
    port = free_port()
    if launcher == "deepspeed":
        return [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", port, "--num_gpus", str(ranks)]
    if launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--master_port", port, "--nproc_per_node", str(ranks)]
    assert launcher == "python"
    assert ranks == 1
    return [sys.executable]


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def numerics(run: Path) -> list[dict[str, Any]]:
    """The rows without times and memory."""
    return [{key: value for key, value in row.items() if not key.startswith(("perf/", "mem/"))} for row in rows(run)]
