"""Starting real runs from tests, and reading what they leave."""

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sys.executable).parent


def free_port() -> str:
    """A port that nobody uses now, so that runs beside each other do not meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def environment(**extra: str) -> dict[str, str]:
    """The tests' environment for a launched run: no tracker, one thread a rank, nothing of an outer launcher."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(launcher)}
    path = os.pathsep.join([str(SCRIPTS), os.environ.get("PATH", "")])
    return {
        **kept,
        "PATH": path,
        "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(ROOT),
        **extra,
    }


def launcher_line(launcher: str, ranks: int) -> list[str]:
    """The words before the script for a launcher."""
    port = free_port()
    if launcher == "deepspeed":
        return [str(SCRIPTS / "deepspeed"), "--master_port", port, "--num_gpus", str(ranks)]
    if launcher == "torchrun":
        return [str(SCRIPTS / "torchrun"), "--master_port", port, "--nproc_per_node", str(ranks)]
    assert launcher == "python"
    assert ranks == 1
    return [sys.executable]


def rows(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def numerics(run: Path) -> list[dict[str, Any]]:
    """The rows without what a clock or an allocator decides."""
    return [{key: value for key, value in row.items() if not key.startswith(("perf/", "mem/"))} for row in rows(run)]
