"""Copies of the state in host memory; test_reshard.py covers DeepSpeed's engines."""

from typing import Any

import pytest
import torch

from inheritune_ds.checkpoints.snapshot import PinnedBuffers, Snapshot


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")


def test_saves_share_their_buffers() -> None:
    buffers, addresses = PinnedBuffers(), []
    for number in range(3):
        one, other = torch.full((1000,), float(number)), torch.zeros(1000)
        copied = buffers.copy({"one": one, "other": other})
        one.fill_(9.0)
        assert (copied["one"][0].item(), copied["other"][0].item()) == (number, 0.0)
        addresses.append((copied["one"].data_ptr(), copied["other"].data_ptr()))
    assert addresses[0][0] != addresses[0][1]
    assert len(set(addresses)) == 1


def test_copies_are_bitwise_equal_and_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    types = (torch.float32, torch.bfloat16, torch.float16)
    given = {
        str(number): torch.randn(7 * number + 1, generator=generator).to(types[number % 3]) for number in range(30)
    }
    copied = PinnedBuffers().copy(given)
    assert list(copied) == list(given)
    for key, value in given.items():
        assert copied[key].dtype == value.dtype
        assert torch.equal(copied[key], value)


def test_page_locked_memory_is_asked_for_in_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, bool]] = []
    empty = torch.empty

    def fake(size: int, *, dtype: torch.dtype, pin_memory: bool, **_: Any) -> torch.Tensor:
        asked.append((size, pin_memory))
        return empty(size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", fake)
    sizes = (300_000, *[90_000, 40_000, 700] * 20)
    masters = {f"{n}/fp32": torch.full((size,), float(n)).as_subclass(OnGpu) for n, size in enumerate(sizes)}
    moments = {key.replace("fp32", "exp_avg"): value for key, value in masters.items()}
    buffers = PinnedBuffers()
    buffers.copy(masters)  # before the first update there are no moments
    buffers.copy(masters | moments)
    buffers.copy(masters | moments)
    assert all(size & (size - 1) == 0 and pinned for size, pinned in asked)
    needed, alone = 2 * 4 * sum(sizes), 2 * sum(1 << (4 * size - 1).bit_length() for size in sizes)
    assert needed <= sum(size for size, _ in asked) < 1.05 * needed < alone


def test_bytes_count_all_fragments() -> None:
    fragments = {"a/fp32/0": torch.zeros(12), "a/exp_avg/0": torch.ones(4, dtype=torch.bfloat16)}
    assert Snapshot(fragments).bytes == 12 * 4 + 4 * 2
