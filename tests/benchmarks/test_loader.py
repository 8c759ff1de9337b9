from pathlib import Path

import pytest

from benchmarks import loader
from tests.benchmarks.conftest import Rehearse


@pytest.mark.rehearsal
def test_rehearsal_compares_all_loaders(rehearse: Rehearse) -> None:
    found, output = rehearse("loader")
    assert set(found["tokens_per_s_per_core"]) == {"project", "project_shards", "project_mixture", "nanogpt"}
    for name in ("project", "project_shards", "project_mixture"):
        assert found["over_nanogpt"][name]["rounds"] == 4
    for plan in ("one_source", "seven_sources"):
        assert found["seek_s"][plan]["rounds"] == loader.SEEKS
        assert 0 < found["order_bytes"][plan] < 1_000_000  # no list of 10 million windows
    assert "seven_sources: seek into 10 billion tokens, ms" in output


def test_readers_return_the_number_of_tokens_read(tmp_path: Path) -> None:
    reading = loader.readers(tmp_path, 5000, 8, 2)
    assert {name: read(32) for name, read in reading.items()} == dict.fromkeys(loader.LOADERS, 512)
