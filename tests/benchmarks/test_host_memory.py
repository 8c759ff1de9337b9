"""The host memory benchmark: its sampler, and a rehearsal."""

import pytest
import torch

from benchmarks.host_memory import peak_growth
from tests.benchmarks.conftest import Rehearse


def test_growth_is_that_of_anonymous_memory_at_its_peak() -> None:
    found: dict[str, float] = {}
    with peak_growth(found, "tensor"):
        for _ in range(3):
            torch.ones(8 << 20).sum()
    assert 0.9 * (32 << 20) < found["tensor"] < 1.5 * (32 << 20)


@pytest.mark.rehearsal
@pytest.mark.timeout(600)
def test_rehearsal_measures_every_file_type_and_precision(rehearse: Rehearse) -> None:
    cases = rehearse("host_memory")[0]["cases"]
    assert len(cases) == 12
    assert all(
        figures["build_bytes_per_parameter"] >= figures["load_bytes_per_parameter"] for figures in cases.values()
    )
    assert all(("export_bytes_per_parameter" in figures) == ("ZeRO-1" in name) for name, figures in cases.items())
