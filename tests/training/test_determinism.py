"""The deterministic mode; what it changes on a GPU, benchmarks.gpu shows."""

from collections.abc import Iterator

import pytest
import torch

from inheritune_ds.errors import MachineError
from inheritune_ds.training.determinism import compute_deterministically


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(mode=False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


@pytest.mark.parametrize("given", [{}, {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}])
def test_every_library_is_told_to_be_deterministic(given: dict[str, str]) -> None:
    environ = {**given}
    compute_deterministically(environ)
    assert environ == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1", **given}
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (True, False)


def test_a_workspace_that_makes_cublas_nondeterministic_is_refused() -> None:
    with pytest.raises(MachineError) as caught:
        compute_deterministically({"CUBLAS_WORKSPACE_CONFIG": ":0:0"})
    assert "CUBLAS_WORKSPACE_CONFIG=:0:0" in caught.value.problem
    assert caught.value.allowed == ":4096:8 or :16:8"
    assert not torch.are_deterministic_algorithms_enabled()
