import pytest
import torch.distributed as dist

from inheritune_ds.distributed.process_group import rank_is_gone


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4711"),
        RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:13016: Connection reset by peer"),
        dist.DistNetworkError("recvValue failed"),
        dist.DistBackendError("NCCL communicator was aborted on rank 1"),
    ],
)
def test_errors_of_a_lost_rank_are_recognized(error: Exception) -> None:
    assert rank_is_gone(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), ValueError("Connection closed by peer"), KeyError("x")]
)
def test_other_errors_are_defects(error: Exception) -> None:
    assert not rank_is_gone(error)
