"""Checkpoints as a test writes them."""

from pathlib import Path
from typing import Any

from blake3 import blake3

from inheritune_ds.checkpoints.store import CheckpointStore

MODEL = bytes(range(256))


def written(temporary: Path, text: str) -> dict[str, Any]:
    """Write a rank's share; the description of the files."""
    files = {"engine/rank0.pt": text.encode(), "engine/model.pt": MODEL}
    (temporary / "engine").mkdir()
    for name, content in files.items():
        (temporary / name).write_bytes(content)
    return {name: {"bytes": len(content), "blake3": blake3(content).hexdigest()} for name, content in files.items()}


def save(store: CheckpointStore, *steps: int, text: str = "state") -> Path:
    for step in steps:
        temporary = store.begin(step)
        fields = {"state": {"step": step, "seconds": 0.1 + step}}
        last = store.publish(temporary, step, fields, written(temporary, f"{text} of {step}"), print)
    return last


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
