"""Start and leave the process group of all ranks."""

import logging
import os
import sys
import warnings
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from inheritune_ds.distributed.coordination import cannot_meet
from inheritune_ds.distributed.device import device_index
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
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    if on_gpu:
        device = device_index(world)
        os.environ["LOCAL_RANK"] = str(device)  # DeepSpeed takes the device from it
        torch.cuda.set_device(device)
    import deepspeed
    from deepspeed.utils import groups

    quiet()
    if on_gpu:
        ask_torch_for_free_memory(deepspeed.get_accelerator())
    try:
        deepspeed.init_distributed(dist_init_required=True, verbose=False, timeout=timeout)
    except dist.DistNetworkError as error:
        raise cannot_meet(error) from None
    # ZeRO communicates in a copy of this group, which DeepSpeed would make with torch's time limit (nccl: 10 minutes).
    groups._WORLD_GROUP = dist.new_group(timeout=timeout)  # noqa: SLF001 - no public way


def ask_torch_for_free_memory(accelerator: Any) -> None:
    """Replace DeepSpeed's question to NVML: it maps CUDA_VISIBLE_DEVICES itself, and fails for a UUID."""
    accelerator.available_memory = lambda device_index=None: torch.cuda.mem_get_info(device_index)[0]


def leave_process_group() -> None:
    """Leave the group that `start_process_group` joined, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end_rank() -> NoReturn:
    """Leave the group and end this process, one of several ranks, after success.

    Gloo's threads may still free the tensors of the last collective. Where the interpreter is ending, that aborts the
    process (SIGABRT), so the interpreter is not ended.
    """
    leave_process_group()
    leave_now(0)


def leave_now(exit_code: int) -> NoReturn:
    """End this process, one of several ranks that has failed, with all its output written.

    With NCCL, leaving the group or the interpreter would wait for ranks that are in a collective.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the reader has gone
            stream.flush()
    os._exit(exit_code)


def quiet() -> None:
    """Keep DeepSpeed's warnings and errors; drop its progress output and its deprecated calls."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
