"""Copies of the state in host memory; test_reshard.py covers DeepSpeed's engines."""

import torch

from inheritune_ds.checkpoints.snapshot import PinnedBuffers, Snapshot


def test_saves_share_their_buffers() -> None:
    buffers, addresses = PinnedBuffers(), []
    for number in range(3):
        one, other = torch.full((1000,), float(number)), torch.zeros(1000)
        copied = buffers.copy("one", one), buffers.copy("other", other)
        one.fill_(9.0)
        assert (copied[0][0].item(), copied[1][0].item()) == (number, 0.0)
        addresses.append((copied[0].data_ptr(), copied[1].data_ptr()))
    assert addresses[0][0] != addresses[0][1]
    assert len(set(addresses)) == 1


def test_bytes_count_all_fragments() -> None:
    fragments = {"a/fp32/0": torch.zeros(12), "a/exp_avg/0": torch.ones(4, dtype=torch.bfloat16)}
    assert Snapshot(fragments).bytes == 12 * 4 + 4 * 2
