"""Checks before the engine: the machine, and the meeting of the ranks."""

import os
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from inheritune_ds.config.reliability import Reliability
from inheritune_ds.distributed import process_group
from inheritune_ds.distributed.process_group import start_process_group
from inheritune_ds.distributed.world import World, export
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


def test_group_and_zero_s_clone_of_it_wait_longer_than_the_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.utils import groups

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    export(MAIN, os.environ)
    reliability = Reliability(watchdog_s={"step": 600.0, "validation": 7200.0})
    assert reliability.group_timeout_s > max(reliability.watchdog_s.values())
    start_process_group(MAIN, timeout_s=reliability.group_timeout_s)
    try:
        for group in (
            dist.distributed_c10d._get_default_group(),
            groups._get_data_parallel_group(),
            groups._get_sequence_data_parallel_group(),
        ):
            options = group._get_backend(torch.device("cpu")).options
            assert options._timeout == timedelta(seconds=7320.0)
    finally:
        process_group.leave_process_group()


def test_a_rank_takes_its_own_card_before_the_group_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed

    def refuse(**_: object) -> None:
        raise dist.DistBackendError(f"reached with LOCAL_RANK {os.environ['LOCAL_RANK']}")

    taken: list[int] = []
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A6000")
    monkeypatch.setattr(deepspeed, "init_distributed", refuse)
    for count, device in ((2, 1), (1, 0)):  # srun may show each rank its own card only
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        with pytest.raises(dist.DistBackendError, match=f"reached with LOCAL_RANK {device}"):
            start_process_group(World(1, 2, 1, 2, "slurm"))
        assert taken.pop() == device
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(MachineError, match="there is no GPU for local rank 2"):
        start_process_group(World(2, 3, 2, 3, "slurm"))
    assert taken == []


def test_free_memory_is_asked_from_torch_whatever_cuda_visible_devices_has(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import cuda_accelerator

    monkeypatch.setattr(cuda_accelerator, "pynvml", Mock())
    accelerator = cuda_accelerator.CUDA_Accelerator()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5d5ba0d6")
    with pytest.raises(ValueError, match="GPU-5d5ba0d6"):  # DeepSpeed's own
        accelerator.available_memory(0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (11, 22))
    process_group.ask_torch_for_free_memory(accelerator)
    assert accelerator.available_memory() == accelerator.available_memory(0) == 11


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
