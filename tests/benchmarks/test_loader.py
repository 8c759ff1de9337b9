from pathlib import Path

import numpy as np
import pytest

from benchmarks import loader
from inheritune_ds.files import read_json


def test_rehearsal_compares_both_loaders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "loader.json"
    assert loader.main(["--rehearse", "--out", str(out)]) == 0
    found = read_json(out)
    assert found is not None
    assert set(found["tokens_per_s_per_core"]) == {"project", "nanogpt"}
    assert found["project_over_nanogpt"]["rounds"] == 4
    assert found["seek_s"]["rounds"] == loader.SEEKS
    assert 0 < found["order_bytes"] < 10_000  # no list of 10 million windows
    assert "seek into 10 billion tokens, ms" in capsys.readouterr().out


def test_both_loaders_read_the_tokens_that_they_tell(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    np.arange(1025, dtype=np.uint16).tofile(path)
    reading = loader.readers(path, 8, 2)
    assert {name: read(32) for name, read in reading.items()} == {"project": 512, "nanogpt": 512}
