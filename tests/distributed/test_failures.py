import pytest
import torch
import torch.distributed as dist

from inheritune_ds.distributed.failures import LostRankError, explain, is_out_of_memory
from inheritune_ds.errors import MachineError

NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:93, {}, NCCL version 2.28.9\n"
DUPLICATE = "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device ac000"


def nccl(kind: str, meaning: str, last: str = "") -> dist.DistBackendError:
    """As torch writes it: a head, the kind of error, and NCCL's own last message."""
    return dist.DistBackendError(NCCL.format(kind) + f"{meaning}\nLast error:\n{last}")


REMOTE = "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
SYSTEM = "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. "
CUDA = "ncclUnhandledCudaError: Call to CUDA function failed."
USAGE = "ncclInvalidUsage: This usually reflects invalid usage of NCCL library."


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4711"),
            "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4711",
        ),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:13016: Connection reset by peer"),
            "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:13016: Connection reset by peer",
        ),
        (dist.DistNetworkError("recvValue failed"), "recvValue failed"),
        (
            dist.DistBackendError("NCCL communicator was aborted on rank 1"),
            "NCCL communicator was aborted on rank 1",
        ),
        (
            nccl("remote process exited or there was a network error", REMOTE, "socketProgress: Connection closed"),
            "socketProgress: Connection closed",
        ),
        (nccl("remote process exited or there was a network error", REMOTE), REMOTE),
        (
            nccl("unhandled system error", SYSTEM, "socketProgress: Connection closed by remote peer node7<4711>"),
            "socketProgress: Connection closed by remote peer node7<4711>",
        ),
    ],
)
def test_errors_of_a_lost_rank_are_recognized(error: Exception, reason: str) -> None:
    found = explain(error)
    assert isinstance(found, LostRankError)
    assert found.problem == f"another rank has gone: {reason}"
    assert found.exit_code == 11


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (nccl("invalid usage", USAGE, DUPLICATE), f"two ranks share one GPU: {DUPLICATE}"),
        (
            nccl(
                "unhandled system error", SYSTEM, "Error while creating shared memory segment /dev/shm/nccl-x (size 9)"
            ),
            "NCCL failed: Error while creating shared memory segment /dev/shm/nccl-x (size 9)",
        ),
        (nccl("unhandled system error", SYSTEM), f"NCCL failed: {SYSTEM.strip()}"),
        (nccl("unhandled cuda error", CUDA, "Cuda failure 101 'x'"), "NCCL failed: Cuda failure 101 'x'"),
    ],
)
def test_errors_of_nccl_keep_their_reason(error: Exception, problem: str) -> None:
    found = explain(error)
    assert type(found) is MachineError
    assert found.problem == problem
    assert found.exit_code == 10


TORCH = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 47.54 GiB of which 1.12 GiB is "
    "free. Including non-PyTorch memory, this process has 46.40 GiB memory in use."
)


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (
            torch.OutOfMemoryError(TORCH),
            f"out of memory: {TORCH.removeprefix('CUDA out of memory. ').partition('. Including')[0]}",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "out of memory: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        ),
        (
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors might"),
            "out of memory: CUDA error: out of memory",
        ),
        (
            nccl("unhandled cuda error", CUDA, "Cuda failure 2 'out of memory'"),
            "out of memory: Cuda failure 2 'out of memory'",
        ),
        (MemoryError(), "out of memory: MemoryError"),
    ],
)
def test_out_of_memory_is_an_error_of_the_machine(error: Exception, problem: str) -> None:
    assert is_out_of_memory(error)
    found = explain(error)
    assert type(found) is MachineError
    assert found.problem == problem
    assert found.exit_code == 10


def test_torch_s_own_allocation_that_fails_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    found = explain(caught.value)
    assert isinstance(found, MachineError)
    assert "you tried to allocate 4611686018427387904 bytes" in found.problem


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), ValueError("Connection closed by peer"), KeyError("out of memory")]
)
def test_other_errors_are_defects(error: Exception) -> None:
    assert explain(error) is None
