"""Write checkpoints without an engine."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from blake3 import blake3

from inheritune_ds.checkpoints.store import CheckpointStore
from inheritune_ds.checkpoints.train_state import SavedLayout, TrainState

MODEL = bytes(range(256))
LAYOUT = SavedLayout(2, 1, "bf16")


def written(temporary: Path, text: str) -> dict[str, Any]:
    """Write a rank's share; the description of the files."""
    files = {"rank-00000.safetensors": text.encode(), "rank-00001.safetensors": MODEL}
    for name, content in files.items():
        (temporary / name).write_bytes(content)
    return {name: {"bytes": len(content), "blake3": blake3(content).hexdigest()} for name, content in files.items()}


def fields_of(step: int) -> dict[str, Any]:
    return {"state": TrainState(step, step * 512, train_seconds=0.1 + step).as_dict(), "layout": asdict(LAYOUT)}


def save(store: CheckpointStore, *steps: int, text: str = "state") -> Path:
    for step in steps:
        temporary = store.begin(step)
        last = store.publish(temporary, step, fields_of(step), written(temporary, f"{text} of {step}"))
    return last


def newest(store: CheckpointStore) -> Path | None:
    found = store.newest_intact()
    return None if found is None else found.path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
