"""Loading by name: any stage and number of ranks into any other, what is refused, what is told."""

import argparse
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inheritune_ds.checkpoints.reshard import MASTER, MOMENTS, Piece, SavedState, check_convertible, stage_3_pieces
from inheritune_ds.checkpoints.shard_reader import SavedFiles, read_shard
from inheritune_ds.checkpoints.train_state import SavedLayout
from inheritune_ds.errors import CheckpointError
from tests.launching import launch
from tests.warm_python import WarmPython

DRIVER = "tests/training/drive_elastic.py"
SAVED = ("1fp32", "2fp32", "3fp32", "1bf16a", "2bf16o", "3bf16")
LOADED = ("1fp32", "2fp32", "3fp32s", "1bf16", "2bf16o", "3bf16")


def drive(
    warm: WarmPython, folder: Path, saved: tuple[str, ...], loaded: tuple[str, ...], *, ranks: int
) -> dict[str, Any]:
    """Launch the driver; what rank 0 tells."""
    launch(warm, folder, DRIVER, str(folder), ",".join(saved), ",".join(loaded), ranks=ranks)
    told: dict[str, Any] = json.loads((folder / f"loaded-{ranks}.json").read_text())
    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elastic")


@pytest.fixture(scope="module")
def on_two(warm: WarmPython, folder: Path) -> dict[str, Any]:
    return drive(warm, folder, SAVED, LOADED, ranks=2)


def check(told: Mapping[str, Any], states: Mapping[str, Any], layouts: tuple[str, ...]) -> None:
    """Every state has come into every layout of its precision as it was."""
    pairs = {name for name in told if "->" in name}
    assert pairs == {f"{state} -> {layout}" for state in states for layout in layouts if layout[1:5] in state}
    for pair in pairs:
        state, found = states[pair.partition(" -> ")[0]], told[pair]
        assert found["digest"] == state["digest"], pair
        assert found["step"] == 2, pair
        assert found["losses"] == pytest.approx(state["losses"], rel=5e-4 if "bf16" in pair else 1e-6), pair


def states_of(told: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in told.items() if "->" not in name}


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_stage_takes_the_state_of_every_stage_to_the_last_bit(on_two: dict[str, Any]) -> None:
    check(on_two, states_of(on_two), LOADED)


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_rank_takes_the_state_of_two_to_the_last_bit(
    warm: WarmPython, on_two: dict[str, Any], folder: Path
) -> None:
    layouts = ("1fp32", "3fp32", "1bf16", "3bf16")
    on_one = drive(warm, folder, ("3bf16",), layouts, ranks=1)
    check(on_one, states_of(on_two) | states_of(on_one), layouts)


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_not_as_it_was_is_told(on_two: dict[str, Any]) -> None:
    assert on_two["1fp32-2 -> 1fp32"]["notes"] == []
    [dealt_out] = on_two["1fp32-2 -> 2fp32"]["notes"]
    assert dealt_out == (
        "the state was saved on 2 ranks in ZeRO stage 1, and is dealt out anew to 2 in stage 2: losses may differ in "
        "their last digits from here on, with dropout by its other masks"
    )
    [rounds] = on_two["1bf16a-2 -> 1bf16"]["notes"]
    assert rounds == (
        "WARNING: data_types.grad_accum_dtype is fp32, and was bf16 when the checkpoint was saved: later steps round "
        "otherwise than an uninterrupted run"
    )


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", ["1fp32", "3fp32"])
def test_deepspeeds_own_converter_finds_the_same_values(
    on_two: dict[str, Any], folder: Path, layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    assert f"{layout}-2" in on_two
    source = folder / f"{layout}-2" / "engine"
    words = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    told = {"input_folder": str(source), "output_folder": str(tmp_path / "out"), "inject_missing_state": False}
    main(argparse.Namespace(**words, **told))
    capsys.readouterr()
    saved, found = SavedState(SavedFiles(source)), sorted((tmp_path / "out" / "zero").glob("*/fp32.pt"))
    assert len(found) == 21
    for path in found:
        for key in (MASTER, *MOMENTS):
            written = torch.load(path.with_name(f"{key}.pt"), weights_only=True)
            wanted = (written["param"] if isinstance(written, dict) else written).flatten()  # stage 3: the bare tensor
            own = torch.zeros_like(wanted)
            saved.fill(own, [Piece(path.parent.name, 0, 0, 0, own.numel())], key)
            assert torch.equal(own, wanted), (path.parent.name, key)


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_state_of_another_model_is_refused(on_two: dict[str, Any], folder: Path) -> None:
    assert "1fp32-2" in on_two
    saved = SavedState(SavedFiles(folder / "1fp32-2" / "engine"))
    with pytest.raises(CheckpointError, match=r"holds another model: 21 parameters are on one side only, first "):
        saved.check_names(set())
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has another number of elements"):
        saved.fill(torch.zeros(13), [Piece("model.norm.weight", 0, 0, 0, 13)], MASTER)


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_missing_file_is_named(on_two: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    assert "1fp32-2" in on_two
    with pytest.raises(CheckpointError, match="lacks the model's file"):
        SavedFiles(tmp_path).model  # noqa: B018 - reading it is what is tested
    shutil.copytree(folder / "1fp32-2" / "engine", tmp_path / "engine")
    (tmp_path / "engine" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match="lacks the optimizer's file of rank 1"):
        SavedFiles(tmp_path / "engine").optimizer  # noqa: B018


class Canary:
    """What runs code when it is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    canary, shard = tmp_path / "canary", tmp_path / "shard.pt"
    torch.save({"optimizer_state_dict": Canary(canary)}, shard)
    with pytest.raises(CheckpointError, match=r"shard\.pt refers to posix\.mkdir: it was not read"):
        read_shard(shard)
    assert not canary.exists()
    torch.load(shard, weights_only=False)  # as DeepSpeed itself loads it
    assert canary.exists()


def test_file_that_is_no_shard_is_refused(tmp_path: Path) -> None:
    shard = tmp_path / "shard.pt"
    shard.write_bytes(pickle.dumps({"step": 1}))
    with pytest.raises(CheckpointError, match=r"shard\.pt cannot be read: "):
        read_shard(shard)


def test_another_precision_is_refused_and_another_layout_is_not() -> None:
    check_convertible(SavedLayout(2, 1, "bf16"), SavedLayout(8, 3, "bf16"))
    with pytest.raises(CheckpointError, match="saved in bf16, and this launch computes in fp32") as refused:
        check_convertible(SavedLayout(2, 1, "bf16"), SavedLayout(2, 1, "fp32"))
    assert "name=OTHER or --runs-dir DIR" in str(refused.value)


@given(
    shapes=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=3),
    ranks=st.integers(1, 9),
)
def test_stage_3_cuts_every_parameter_into_shares_that_cover_it_once(shapes: list[list[int]], ranks: int) -> None:
    named = [
        {f"{group}.{number}": torch.Size([size]) for number, size in enumerate(sizes)}
        for group, sizes in enumerate(shapes)
    ]
    covered: dict[str, list[int]] = {}
    for rank in range(ranks):
        for piece in stage_3_pieces(named, rank, ranks):
            assert piece.numel >= 0
            covered.setdefault(piece.name, []).extend(range(piece.start, piece.start + piece.numel))
    for group in named:
        for name, shape in group.items():
            assert covered[name] == list(range(shape.numel()))
