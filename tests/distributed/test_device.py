"""The device of a rank, with stand-ins for the devices of torch.cuda."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from threading import Thread
from typing import Any

import pytest
import torch

from inheritune_ds.config.deepspeed import Machine
from inheritune_ds.distributed import coordination, device
from inheritune_ds.distributed.coordination import Coordinator, MainRankLeftError
from inheritune_ds.distributed.device import device_index, device_kind, take_device
from inheritune_ds.distributed.signals import StopSignal
from inheritune_ds.distributed.world import World
from inheritune_ds.errors import InherituneError, MachineError
from inheritune_ds.plan.machine import DetectedGpu
from tests.distributed.test_coordination import Notes

ALONE = World(0, 1, 0, 1, "single")
A6000, RTX3090, T400 = ("NVIDIA RTX A6000", 47.5, (8, 6)), ("RTX 3090", 23.7, (8, 6)), ("NVIDIA T400 4GB", 3.75, (7, 5))


@dataclass
class Properties:
    """What `torch.cuda.get_device_properties` returns."""

    name: str
    major: int
    minor: int
    uuid: str


Cards = Callable[..., None]


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Cards:
    """Make torch see these cards; the first `used_gib` of each are in use."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)

    def put(*found: tuple[str, float, tuple[int, int]], used_gib: float = 0.0) -> None:
        def properties(index: int) -> Properties:
            name, _, (major, minor) = found[index]
            return Properties(name, major, minor, f"uuid-{name}-{index}")

        def memory(index: int) -> tuple[int, int]:
            total = found[index][1]
            return int((total - used_gib) * 2**30), int(total * 2**30)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(found))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
        monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: found[index][0])
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        monkeypatch.setattr(torch.cuda, "mem_get_info", memory)

    return put


def alone() -> Machine:
    return take_device(device_kind(), ALONE, Coordinator(ALONE, StopSignal()))


def test_the_rank_s_own_card_decides_not_the_least_of_the_machine(cards: Cards) -> None:
    cards(A6000, T400)  # CUDA's order is the fastest first
    assert alone() == Machine("cuda", 47.5, bf16=True, name="NVIDIA RTX A6000")
    cards(T400)
    assert alone() == Machine("cuda", 3.75, bf16=False, name="NVIDIA T400 4GB")


def test_memory_in_use_counts_as_used_but_for_the_context_of_this_process(cards: Cards) -> None:
    cards(A6000, used_gib=0.3)  # its own context
    assert alone().memory_gib == 47.5
    cards(A6000, used_gib=20.5)
    assert alone().memory_gib == 27.5


def test_a_slice_has_its_own_memory_and_no_known_peak(cards: Cards) -> None:
    from inheritune_ds.plan.gpus import identify

    cards(("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 39.5, (8, 0)))
    found = alone()
    assert (found.memory_gib, found.bf16, identify(found.name)) == (39.5, True, None)


def test_without_nvidia_smi_the_card_that_torch_sees_is_used(cards: Cards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "detect_gpus", list)
    cards(A6000)
    assert device_kind() == "cuda"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert device_kind() == "cpu"


def test_a_card_that_torch_cannot_use_is_not_replaced_by_the_cpu(cards: Cards, monkeypatch: pytest.MonkeyPatch) -> None:
    cards()
    monkeypatch.setattr(device, "detect_gpus", lambda: [DetectedGpu("NVIDIA RTX A6000", 48.0, (8, 6), 48.0)])
    assert device_kind() == "cuda"  # `check_device` refuses it
    monkeypatch.setattr(device, "detect_gpus", list)
    assert device_kind() == "cpu"


@pytest.mark.parametrize(
    ("facts_of_torch", "visible", "reason"),
    [
        (("13.0", False), None, f"torch {torch.__version__} sees no GPU"),
        (("13.0", False), "-1", "CUDA_VISIBLE_DEVICES='-1' leaves no GPU"),
        (("13.0", True), None, "DS_ACCELERATOR is cpu"),
        ((None, False), None, f"torch {torch.__version__} is built without CUDA"),
    ],
)
def test_the_log_says_why_a_run_with_a_driver_is_on_the_cpu(
    facts_of_torch: tuple[str | None, bool],
    visible: str | None,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cuda, seen = facts_of_torch
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)
    monkeypatch.setattr(device, "has_driver", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with caplog.at_level(logging.INFO):
        assert take_device("cpu", ALONE, Coordinator(ALONE, StopSignal())).kind == "cpu"
    assert caplog.messages == [f"device: the CPU, because {reason}"]


def test_the_log_names_the_card(cards: Cards, caplog: pytest.LogCaptureFixture) -> None:
    cards(A6000)
    with caplog.at_level(logging.INFO):
        alone()
    assert caplog.messages == ["device: NVIDIA RTX A6000, 47.5 GiB free"]


def test_local_ranks_have_a_card_each(cards: Cards) -> None:
    cards(A6000, A6000)
    assert [device_index(World(rank, 2, rank, 2, "env")) for rank in (0, 1)] == [0, 1]
    cards(A6000)
    assert device_index(World(1, 2, 1, 2, "slurm")) == 0  # srun shows each rank its own
    cards(A6000, RTX3090)
    with pytest.raises(MachineError) as caught:
        device_index(World(2, 3, 2, 3, "slurm"))
    assert caught.value.problem.startswith("there is no GPU for local rank 2 (rank 2) on ")
    assert caught.value.problem.endswith("torch sees 2 GPUs (0 NVIDIA RTX A6000, 1 RTX 3090)")
    assert "--gpus-per-task=1" in caught.value.action


def test_a_card_that_refuses_a_context_is_named(cards: Cards, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> tuple[int, int]:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nmore lines")

    cards(A6000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)
    with pytest.raises(MachineError, match=r"GPU 0 on .* cannot be used: CUDA error: CUDA-capable .* unavailable\n"):
        alone()


def facts(rank: int, machine: Machine, uuid: str = "") -> dict[str, Any]:
    found = {"rank": rank, "host": f"node{rank}", "machine": vars(machine)}
    return {**found, "uuid": uuid} if uuid else found


GPU, CPU = Machine("cuda", 47.5, bf16=True, name="A6000"), Machine("cpu", 12.0, bf16=True)


def together(
    monkeypatch: pytest.MonkeyPatch, own: list[dict[str, Any] | MachineError]
) -> list[Machine | InherituneError]:
    """What `take_device` returns or raises on each of two ranks with these facts."""
    store = Notes()
    monkeypatch.setattr(coordination, "open_store", lambda: store)
    monkeypatch.setattr(coordination, "POLL_S", 0.01)
    found: dict[int, Machine | InherituneError] = {}

    def own_gpu(world: World) -> dict[str, Any]:
        given = own[world.rank]
        if isinstance(given, MachineError):
            raise given
        return {key: value for key, value in given.items() if key != "rank"}

    def run(rank: int) -> None:
        world = World(rank, 2, rank, 2, "slurm")
        try:
            found[rank] = take_device("cuda", world, Coordinator(world, StopSignal()))
        except InherituneError as error:
            found[rank] = error

    monkeypatch.setattr(device, "_own_gpu", own_gpu)
    threads = [Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    return [found[0], found[1]]


def test_ranks_agree_on_the_least_of_their_own_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Machine("cuda", 23.7, bf16=True, name="RTX 3090")
    agreed = Machine("cuda", 23.7, bf16=True)  # no name, and so no peak, for different cards
    assert together(monkeypatch, [facts(0, GPU, "a"), facts(1, small, "b")]) == [agreed, agreed]
    assert together(monkeypatch, [facts(0, GPU, "a"), facts(1, GPU, "b")]) == [GPU, GPU]


@pytest.mark.parametrize(
    ("own", "problem"),
    [
        ([facts(0, GPU, "uuid-a"), facts(1, GPU, "uuid-a")], "ranks 0 and 1 share one GPU on node0: A6000 (uuid-a)"),
        ([facts(0, GPU, "a"), facts(1, CPU)], "rank 0 on node0 has a GPU, but rank 1 on node1 has none"),
        ([facts(0, GPU, "a"), MachineError("GPU 1 cannot be used")], "GPU 1 cannot be used"),
    ],
)
def test_ranks_end_together_when_one_has_no_card_of_its_own(
    own: list[Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, second = together(monkeypatch, own)
    assert isinstance(main, MachineError)
    assert main.problem == problem
    assert isinstance(second, MainRankLeftError)
    assert second.problem == f"rank 0 has ended the run: {problem}"
    assert second.exit_code == 10
