import pytest

from inheritune_ds.cli import options
from inheritune_ds.errors import MachineError
from inheritune_ds.plan import machine


@pytest.mark.parametrize("value", ["gpu", "", "CPU", "xpu"])
@pytest.mark.parametrize("gpu", [None, "a6000"])
def test_an_unknown_accelerator_is_refused(value: str, gpu: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", value)
    with pytest.raises(MachineError) as caught:
        options.machine_for(gpu, 1)
    assert caught.value.problem == f"the environment variable DS_ACCELERATOR is {value!r}"
    assert caught.value.action == "unset DS_ACCELERATOR, or set it to cpu to run on the CPU"


def test_cuda_is_refused_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setattr(machine, "detect_gpus", list)
    monkeypatch.setattr(machine, "has_driver", lambda: False)
    with pytest.raises(MachineError, match="this machine has no GPU"):
        options.machine_for(None, 1)
    assert options.machine_for("a6000", 1).kind == "cuda"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert options.machine_for(None, 1).kind == "cpu"
