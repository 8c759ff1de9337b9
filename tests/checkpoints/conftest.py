from pathlib import Path

import pytest

from inheritune_ds.checkpoints.store import CheckpointStore


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def store(folder: Path) -> CheckpointStore:
    return CheckpointStore(folder, keep=3)
