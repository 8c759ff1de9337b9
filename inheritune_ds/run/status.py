"""status.json of a run folder: the state of the run, for scripts."""

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
        state: `requeue`: rerun the same command to resume.
        step: Of the newest checkpoint. `saved_step` keeps the largest, so that a run whose checkpoints have disappeared
            does not start over.
        reason: The cause, in words.
        exit_code: Of this process, if it ends.

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
    # Only the reason is redacted: scripts read the state, even if a secret equals that word.
    write_exact(run_dir / STATUS, json.dumps(document, indent=2) + "\n")
