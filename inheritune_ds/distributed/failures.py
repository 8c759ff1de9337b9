"""Errors of torch, NCCL and gloo in the user's words: what failed, and what to do."""

import re

import torch
import torch.distributed as dist

from inheritune_ds.errors import InherituneError, MachineError, TrainingError

# torch's allocators, the CUDA runtime (torch names its number 2 so), cuBLAS and NCCL
_OUT_OF_MEMORY = re.compile(
    r"out of memory|CUBLAS_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation|can't allocate memory", re.IGNORECASE
)
_GONE = re.compile(
    r"Connection (closed|reset)|Broken pipe|Timed out waiting|ncclRemoteError|remote process exit|"
    r"NCCL communicator was aborted|Watchdog caught collective operation timeout",
    re.IGNORECASE,
)
_NCCL = re.compile(r"NCCL error|nccl[A-Z]\w+Error|ncclInvalid")
_DUPLICATE = re.compile(r"Duplicate GPU detected.*")
_LAST_ERROR = re.compile(r"Last error:\s*(\S.*)")
_KIND = re.compile(r"(?:^|\n)(nccl[A-Z]\w+: .*)")


class LostRankError(TrainingError):
    """Another rank has ended or does not answer; the cause is its own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or in host memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def explain(error: Exception) -> InherituneError | None:
    """The error for a failure of memory, of a collective or of another rank; None for any other, which is a defect."""
    text = str(error)
    if is_out_of_memory(error):
        return MachineError(
            out_of_memory_text(error),
            action="look for other programs that use the device or the host's memory, then rerun the same command",
        )
    if not isinstance(error, RuntimeError):
        return None
    reason = _reason(text)
    if duplicate := _DUPLICATE.search(text):
        return MachineError(
            f"two ranks share one GPU: {duplicate[0]}",
            allowed="one rank a GPU",
            action="start as many ranks a machine as GPUs, and look at CUDA_VISIBLE_DEVICES of each rank",
        )
    if _GONE.search(text) or isinstance(error, dist.DistStoreError | dist.DistNetworkError):
        return LostRankError(
            f"another rank has gone: {reason}",
            action="find out how it has ended (memory, its machine, the network), then rerun the same command to "
            "resume from the newest checkpoint",
        )
    if _NCCL.search(text) or isinstance(error, dist.DistError):
        return MachineError(
            f"NCCL failed: {reason}",
            action="look at the messages above; NCCL_DEBUG=WARN prints more. Usual causes: a small /dev/shm, a network "
            "interface that the other machines do not reach (NCCL_SOCKET_IFNAME), a driver older than NCCL's CUDA",
        )
    return None


def _reason(text: str) -> str:
    """NCCL's last error, else its kind of error, else the last line's first sentence."""
    for pattern in (_LAST_ERROR, _KIND):
        if found := pattern.search(text):
            return found[1].strip()
    return (text.strip().splitlines() or ["no reason given"])[-1].partition(". ")[0]


def out_of_memory_text(error: BaseException) -> str:
    """One line on a failed allocation: its size, and what the device has, as far as the error names them."""
    if _NCCL.search(str(error)):
        return f"out of memory: {_reason(str(error))}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"out of memory: {'. '.join(lines[0].removeprefix('CUDA out of memory. ').split('. ')[:2])}"
