"""The device of this rank, as torch sees it, and the least of all ranks' devices."""

import logging
import os
import socket
from collections import defaultdict
from dataclasses import asdict
from typing import Any, Literal

import torch

from inheritune_ds.config.deepspeed import Machine
from inheritune_ds.distributed.coordination import Coordinator
from inheritune_ds.distributed.world import World
from inheritune_ds.errors import MachineError
from inheritune_ds.plan.machine import cpu_machine, detect_gpus, has_driver

logger = logging.getLogger(__name__)

CONTEXT_GIB = 0.5
"""At most this much of a GPU is used by this process's own CUDA context, there before torch reports what is free;
the plan counts it in its margin."""


def device_kind() -> Literal["cuda", "cpu"]:
    """`cuda` if torch sees a GPU, or nvidia-smi lists one that torch should see, unless DS_ACCELERATOR is cpu."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return "cpu"
    return "cuda" if torch.cuda.is_available() or detect_gpus() else "cpu"


def device_index(world: World) -> int:
    """Index of this rank's GPU among those that torch sees.

    Raises:
        MachineError: If there is none for this rank.
    """
    count = torch.cuda.device_count()
    if world.local_rank < count:
        return world.local_rank
    if count == 1:  # srun may show each rank its own GPU only; `take_device` refuses ranks that share one
        return 0
    names = ", ".join(f"{index} {torch.cuda.get_device_name(index)}" for index in range(count))
    raise MachineError(
        f"there is no GPU for local rank {world.local_rank} (rank {world.rank}) on {socket.gethostname()}: torch sees "
        f"{count} GPUs ({names})",
        allowed="one rank a GPU",
        action=_ONE_EACH,
    )


_ONE_EACH = (
    "start as many ranks a machine as GPUs: deepspeed --num_gpus N; srun with --gres=gpu:N and --ntasks-per-node=N, or "
    "with --gpus-per-task=1"
)


def take_device(kind: Literal["cuda", "cpu"], world: World, meeting: Coordinator) -> Machine:
    """Bind this rank to its GPU; all ranks must call it together.

    Returns:
        The least of all ranks' devices, on every rank, so that all fill in the same values.

    Raises:
        MachineError: If a rank has no GPU of its own, or it cannot be used, or some ranks have a GPU and some none.
        MainRankLeftError: The same error, on the other ranks.
    """
    own: dict[str, Any] = {"rank": world.rank, "host": socket.gethostname()}
    try:
        own |= _own_gpu(world) if kind == "cuda" else {"machine": asdict(cpu_machine(world.local_size))}
    except MachineError as error:  # raised on rank 0, since the other ranks wait
        own["error"] = {"problem": error.problem, "allowed": error.allowed, "action": error.action}
    machine = Machine(**meeting.combine(own, _least))
    if machine.kind == "cuda":
        logger.info("device: %s, %.1f GiB free", machine.name or "GPUs of several kinds", machine.memory_gib)
    elif torch.version.cuda is not None or has_driver():
        logger.info("device: the CPU, because %s", _why_cpu())
    return machine


def _own_gpu(world: World) -> dict[str, Any]:
    index = device_index(world)
    try:
        torch.cuda.set_device(index)
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:  # full, or in use by one process only
        raise MachineError(
            f"GPU {index} on {socket.gethostname()} cannot be used: {str(error).splitlines()[0]}",
            action="look at nvidia-smi for other programs on it, or select another GPU with CUDA_VISIBLE_DEVICES",
        ) from None
    properties = torch.cuda.get_device_properties(index)
    memory_gib = min(total, free + CONTEXT_GIB * 2**30) / 2**30
    machine = Machine("cuda", memory_gib, bf16=(properties.major, properties.minor) >= (8, 0), name=properties.name)
    return {"uuid": str(properties.uuid), "machine": asdict(machine)}


def _least(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The least device as JSON; `ranks` are the facts of every rank, by rank."""
    failed = next((rank for rank in ranks if "error" in rank), None)
    if failed is not None:
        raise MachineError(**failed["error"])
    machines = [Machine(**rank["machine"]) for rank in ranks]
    by_kind = {machine.kind: rank for machine, rank in zip(machines, ranks, strict=True)}
    if len(by_kind) > 1:
        gpu, cpu = by_kind["cuda"], by_kind["cpu"]
        raise MachineError(
            f"rank {gpu['rank']} on {gpu['host']} has a GPU, but rank {cpu['rank']} on {cpu['host']} has none",
            allowed="a GPU for every rank, or for none",
            action="compare nvidia-smi and CUDA_VISIBLE_DEVICES on both machines, or set DS_ACCELERATOR=cpu for all",
        )
    _refuse_shared(ranks)
    names = {machine.name for machine in machines}
    memory_gib, bf16 = min(machine.memory_gib for machine in machines), all(machine.bf16 for machine in machines)
    return asdict(Machine(machines[0].kind, memory_gib, bf16, names.pop() if len(names) == 1 else ""))


def _refuse_shared(ranks: list[dict[str, Any]]) -> None:
    sharing: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for rank in ranks:
        if "uuid" in rank:
            sharing[rank["uuid"]].append(rank)
    for uuid, group in sharing.items():
        if len(group) > 1:
            numbers = " and ".join(str(rank["rank"]) for rank in group)
            raise MachineError(
                f"ranks {numbers} share one GPU on {group[0]['host']}: {group[0]['machine']['name']} ({uuid})",
                allowed="one rank a GPU",
                action=_ONE_EACH,
            )


def _why_cpu() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.cuda.is_available():
        return "DS_ACCELERATOR is cpu"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES={visible!r} leaves no GPU"
    return f"torch {torch.__version__} sees no GPU"
