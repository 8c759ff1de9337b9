"""Checks before the engine: the machine, and the meeting of the ranks."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from inheritune_ds.distributed import process_group
from inheritune_ds.distributed.process_group import start_process_group
from inheritune_ds.distributed.world import World
from inheritune_ds.errors import MachineError
from inheritune_ds.training.toolchain import check_device

MAIN = World(0, 1, 0, 1, "single")


@pytest.mark.parametrize("gpu", [False, True])
def test_the_compiler_is_checked_where_cpu_operators_are_built(
    gpu: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(MachineError, match=r"no C\+\+ compiler found \(/nonexistent\)"):
        # on a GPU the CPU operators are built for offload only
        check_device("cuda" if gpu else "cpu", MAIN, offload=gpu)
    if gpu:
        check_device("cuda", MAIN, offload=False)


def test_a_gpu_that_torch_cannot_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_device("cpu", MAIN, offload=False)
    with pytest.raises(MachineError) as caught:
        check_device("cuda", MAIN, offload=False)
    assert caught.value.problem == f"this machine has a GPU, but torch {torch.__version__} cannot use it"
    assert "DS_ACCELERATOR=cpu" in caught.value.action


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device("cuda", World(3, 4, 1, 2, "env"), offload=False)
    check_device("cuda", World(3, 4, 0, 4, "slurm"), offload=False)  # srun may show each rank its own GPU only
    with pytest.raises(MachineError) as caught:
        check_device("cuda", World(0, 4, 0, 4, "env"), offload=False)
    assert caught.value.problem == "4 ranks on this machine, but torch sees 2 GPUs"
    assert caught.value.action == "start at most 2 ranks (deepspeed --num_gpus N)"


def test_ranks_that_cannot_meet_name_address_and_port(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed

    def refuse(**_: object) -> None:
        raise dist.DistNetworkError("EADDRINUSE\nC++ frames")

    monkeypatch.setattr(deepspeed, "init_distributed", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(MachineError) as caught:
        start_process_group(MAIN)
    assert caught.value.problem == "the ranks cannot meet at node1:29500: EADDRINUSE"
    assert "--master_port 29501" in caught.value.action


def test_a_process_joins_its_group_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    left: list[bool] = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append(True))
    met: list[bool] = []
    monkeypatch.setattr(dist, "barrier", lambda: met.append(True))
    start_process_group(MAIN)
    start_process_group(MAIN)
    assert met == [True, True]
    process_group.leave_process_group()
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    process_group.leave_process_group()
    assert left == [True]
