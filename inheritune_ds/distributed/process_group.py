"""Start and leave the process group of all ranks."""

import logging
import os
import re
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from inheritune_ds.distributed.coordination import cannot_meet
from inheritune_ds.distributed.world import World


def start_process_group(world: World, *, timeout_s: float = 600.0) -> None:
    """Wait for all ranks; the first time, make them a group. DeepSpeed selects nccl or gloo.

    Args:
        world: This rank among all.
        timeout_s: Time limit of every collective; the default is DeepSpeed's (deepspeed/constants.py).

    Raises:
        MachineError: If the ranks cannot meet.
    """
    if dist.is_initialized():
        dist.barrier()
        return
    _make_group(world, timedelta(seconds=timeout_s))
    dist.barrier()
    # DeepSpeed's ranks on a CPU share memory that all have opened by now. DeepSpeed removes these 64 MiB a rank
    # (csrc/cpu/comm/shm.cpp) at a clean end only: every killed rank would leave them until the machine restarts.
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    buffer = Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{world.rank}")  # noqa: S108
    buffer.unlink(missing_ok=True)


def _make_group(world: World, timeout: timedelta) -> None:
    if torch.cuda.is_available():
        # Under srun each rank may see its own GPU only; DeepSpeed takes the device from LOCAL_RANK.
        device = world.local_rank % torch.cuda.device_count()
        os.environ["LOCAL_RANK"] = str(device)
        torch.cuda.set_device(device)
    import deepspeed
    from deepspeed.utils import groups

    quiet()
    try:
        deepspeed.init_distributed(dist_init_required=True, verbose=False, timeout=timeout)
    except dist.DistNetworkError as error:
        raise cannot_meet(error) from None
    # ZeRO communicates in a copy of this group, which DeepSpeed would make with torch's time limit (nccl: 10 minutes).
    groups._WORLD_GROUP = dist.new_group(timeout=timeout)  # noqa: SLF001 - no public way


_GONE = re.compile(r"Connection (closed|reset)|Broken pipe|Timed out waiting")


def rank_is_gone(error: Exception) -> bool:
    """Whether a collective failed because another rank ended, or its machine or the network failed."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(_GONE.search(str(error))))


def leave_process_group() -> None:
    """Leave the group that `start_process_group` joined, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def quiet() -> None:
    """Keep DeepSpeed's warnings and errors; drop its progress output and its deprecated calls."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
