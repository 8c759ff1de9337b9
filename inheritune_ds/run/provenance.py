"""provenance.json of a run folder: code, versions, machine and command of the last launch."""

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from inheritune_ds import __version__
from inheritune_ds.storage.files import write_json

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "numpy", "safetensors")


def write_provenance(run_dir: Path, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Write provenance.json with further entries, without environment variables; the document."""
    document = {
        "inheritune_ds": __version__,
        "git": _git_state(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **extra,
    }
    write_json(run_dir / "provenance.json", document)
    return document


def _git_state() -> dict[str, Any] | None:
    """Commit of this package's checkout, and whether files have changed since; None outside of a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
