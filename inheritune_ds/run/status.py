"""status.json of a run folder: the state of the run, for scripts that decide what comes next."""

import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from inheritune_ds.storage.files import read_json, write_exact
from inheritune_ds.storage.redaction import redact

STATUS = "status.json"
State = Literal["preparing", "running", "finished", "requeue", "failed"]


def read_status(run_dir: Path) -> dict[str, Any]:
    """The last status written; empty if there is none."""
    found = read_json(run_dir / STATUS)
    return found if isinstance(found, dict) else {}


def write_status(run_dir: Path, state: State, *, step: int = 0, reason: str = "", exit_code: int = 0) -> None:
    """Write status.json.

    Args:
        run_dir: The run folder.
        state: `requeue` means: rerun the same command to resume.
        step: Of the newest checkpoint. The latest ever written here stays as `saved_step`: a run whose checkpoints
            have disappeared must not start over unnoticed.
        reason: Why the run is in this state, in words.
        exit_code: Of this process, where it has ended.

    Raises:
        StorageError: The file cannot be written.
    """
    document = {
        "state": state,
        "step": step,
        "saved_step": max(step, read_status(run_dir).get("saved_step", 0)),
        "reason": redact(reason),
        "exit_code": exit_code,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    # Exact except for the reason: scripts read the state, even where a secret happens to be that word.
    write_exact(run_dir / STATUS, json.dumps(document, indent=2) + "\n")
