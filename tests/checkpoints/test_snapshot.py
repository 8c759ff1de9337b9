import copyreg
import enum
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from inheritune_ds.checkpoints.shard_reader import pickle_stage_by_value, read_shard
from inheritune_ds.checkpoints.shard_writer import write_shard
from inheritune_ds.checkpoints.snapshot import CapturedState, PinnedBuffers, capture
from inheritune_ds.errors import CheckpointError


def state() -> dict[str, Any]:
    flat = torch.arange(12.0)
    return {
        "module": OrderedDict(embedding=flat[:6].view(2, 3), head=flat[:6].view(2, 3), block=flat[6:]),
        "groups": [{"lr": 0.1, "parts": (torch.ones(4, dtype=torch.bfloat16), torch.tensor(3))}],
        "empty": torch.empty(0),
    }


def test_a_copy_has_the_values_and_shares_nothing() -> None:
    own = state()
    copied = PinnedBuffers().copy(own)
    own["module"]["embedding"].zero_()
    own["groups"][0]["parts"][0].zero_()
    own["groups"][0]["lr"] = 0.2
    expected = state()
    assert isinstance(copied["module"], OrderedDict)
    for name, value in expected["module"].items():
        assert torch.equal(copied["module"][name], value)
    assert copied["groups"][0]["lr"] == 0.1
    assert torch.equal(copied["groups"][0]["parts"][0], expected["groups"][0]["parts"][0])
    assert copied["groups"][0]["parts"][1].item() == 3


def test_tensors_that_share_memory_share_it_in_the_copy() -> None:
    copied = PinnedBuffers().copy(state())["module"]
    assert copied["embedding"].data_ptr() == copied["head"].data_ptr()
    assert copied["block"].untyped_storage().data_ptr() == copied["head"].untyped_storage().data_ptr()


def test_the_memory_of_a_save_serves_the_next() -> None:
    copies, addresses = PinnedBuffers(), []
    for _ in range(3):
        copies.recycle()
        one, other = copies.copy(torch.ones(1000)), copies.copy([torch.zeros(1000)])[0]
        assert (one[0].item(), other[0].item()) == (1.0, 0.0)
        addresses.append((one.data_ptr(), other.data_ptr()))
    assert addresses[0][0] != addresses[0][1]
    assert len(set(addresses)) == 1


def test_bytes_are_those_that_are_written() -> None:
    captured = CapturedState({"one": state(), "other": [torch.zeros(5, dtype=torch.int64)]})
    assert captured.bytes == 12 * 4 + 4 * 2 + 8 + 5 * 8


class DeepSpeed:
    """What a capture sees of the engine."""

    def __init__(self) -> None:
        self.checkpoint_engine: Any = "its own"
        self.weights = torch.zeros(3)
        self.scripts: list[str] = []

    def _copy_recovery_script(self, folder: str) -> None:
        self.scripts.append(folder)

    def save_checkpoint(self, folder: str, *, tag: str, client_state: dict[str, Any], save_latest: bool) -> None:
        engine = self.checkpoint_engine
        assert not engine.is_decoupled()
        assert not save_latest
        engine.create(None)
        engine.makedirs(f"{folder}/{tag}", exist_ok=True)
        engine.save({"module": self.weights, **client_state}, f"{folder}/{tag}/model.pt")
        engine.save(state_dict=[self.weights], path=f"{folder}/{tag}/optimizer.pt")
        self._copy_recovery_script(folder)
        engine.commit(None)


@pytest.mark.parametrize("copied", [False, True])
def test_what_deepspeed_would_write_is_taken_by_file(copied: bool) -> None:  # noqa: FBT001 - a case
    engine = DeepSpeed()
    captured = capture(engine, {"more": 1}, PinnedBuffers() if copied else None)
    engine.weights.fill_(5.0)
    assert captured.failure is None
    assert captured.shards.keys() == {"engine/model.pt", "engine/optimizer.pt"}
    assert captured.shards["engine/model.pt"]["more"] == 1
    assert captured.shards["engine/model.pt"]["module"].tolist() == [0.0 if copied else 5.0] * 3


def test_the_engine_is_left_as_it_was_and_no_script_is_copied() -> None:
    engine = DeepSpeed()
    capture(engine, {}, None)
    assert engine.checkpoint_engine == "its own"
    assert engine.scripts == []
    engine._copy_recovery_script("again")
    assert engine.scripts == ["again"]


def test_a_copy_that_does_not_fit_is_told_after_the_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(PinnedBuffers, "copy", refuse)
    engine = DeepSpeed()
    captured = capture(engine, {}, PinnedBuffers())
    assert str(captured.failure) == "CUDA error: out of memory"
    assert captured.shards == {}
    assert engine.checkpoint_engine == "its own"


def test_a_stage_is_read_whatever_python_has_written_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    # as Python 3.11.0 to 3.11.3 pickles every enum
    monkeypatch.setattr(enum.Enum, "__reduce_ex__", lambda stage, _: (getattr, (type(stage), stage.name)))
    pickle_stage_by_value()
    write_shard({"zero_stage": ZeroStageEnum.gradients}, tmp_path / "one.pt", needed_bytes=0)
    assert read_shard(tmp_path / "one.pt") == {"zero_stage": ZeroStageEnum.gradients}
    monkeypatch.delitem(copyreg.dispatch_table, ZeroStageEnum)
    write_shard({"zero_stage": ZeroStageEnum.gradients}, tmp_path / "two.pt", needed_bytes=0)
    with pytest.raises(CheckpointError, match="refers to getattr: it was not read"):
        read_shard(tmp_path / "two.pt")
