"""Loading by name: any stage and number of ranks into any other, refusals, and log lines."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file

from inheritune_ds.checkpoints.fragments import MASTER
from inheritune_ds.checkpoints.manifest import read_manifest
from inheritune_ds.checkpoints.reshard import check_convertible, check_model, stage_3_pieces
from inheritune_ds.checkpoints.train_state import SavedLayout
from inheritune_ds.errors import CheckpointError
from tests.launching import launch
from tests.warm_python import WarmPython

DRIVER = "tests/checkpoints/drive_reshard.py"
OVERFLOWS_ALONE = ("1fp16xx", "3fp16xx")
SAVED = (
    *("1fp32", "2fp32", "3fp32", "1bf16", "2bf16", "3bf16", "1fp16", "2fp16x", "3fp16"),
    *("1bf16a", "2bf16o", "3bf16o", *OVERFLOWS_ALONE),
)
LOADED = (
    *("1fp32", "2fp32", "3fp32", "1bf16", "2bf16", "3bf16", "1fp16", "2fp16", "3fp16"),
    *("3fp32s", "2bf16o", "3bf16o"),
)


def launched(function: Any) -> Any:
    for mark in (pytest.mark.launch, pytest.mark.slow, pytest.mark.timeout(600)):
        function = mark(function)
    return function


def drive(
    warm: WarmPython, folder: Path, saved: tuple[str, ...], loaded: tuple[str, ...], *, ranks: int
) -> dict[str, Any]:
    launch(warm, folder, DRIVER, str(folder), ",".join(saved), ",".join(loaded), ranks=ranks)
    report: dict[str, Any] = json.loads((folder / f"loaded-{ranks}.json").read_text())
    return report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elastic")


@pytest.fixture(scope="module")
def on_two(warm: WarmPython, folder: Path) -> dict[str, Any]:
    return drive(warm, folder, SAVED, LOADED, ranks=2)


def check(report: Mapping[str, Any], states: Mapping[str, Any], layouts: tuple[str, ...]) -> None:
    """Every layout has loaded every state of its precision bitwise."""
    pairs = {name for name in report if "->" in name}
    assert pairs == {f"{state} -> {layout}" for state in states for layout in layouts if layout[1:5] in state}
    for pair in pairs:
        state, found = states[pair.partition(" -> ")[0]], report[pair]
        assert found["digest"] == state["digest"], pair
        assert found["step"] == 2, pair
        assert found["losses"] == pytest.approx(state["losses"], rel=1e-6 if "fp32" in pair else 5e-4), pair


def states_of(report: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if "->" not in name}


@launched
def test_every_stage_loads_every_stage_bitwise(on_two: dict[str, Any]) -> None:
    check(on_two, states_of(on_two), LOADED)


@launched
def test_one_rank_loads_the_state_of_two_bitwise(warm: WarmPython, on_two: dict[str, Any], folder: Path) -> None:
    layouts = ("1fp32", "3fp32", "1bf16", "3bf16")
    on_one = drive(warm, folder, ("3bf16",), layouts, ranks=1)
    states = {
        name: state
        for name, state in (states_of(on_two) | states_of(on_one)).items()
        if "fp16" not in name or "bf16" in name
    }
    check(on_one, states, layouts)


@launched
def test_changes_are_logged(on_two: dict[str, Any]) -> None:
    assert on_two["1fp32-2 -> 1fp32"]["notes"] == []
    [resharded] = on_two["1fp32-2 -> 2fp32"]["notes"]
    assert resharded == (
        "the state was saved on 2 ranks in ZeRO stage 1, and is resharded to 2 in stage 2: losses may differ in their "
        "last digits from here on, and by more with dropout, whose masks change"
    )
    [rounds] = on_two["1bf16a-2 -> 1bf16"]["notes"]
    assert rounds == (
        "WARNING: data_types.grad_accum_dtype is fp32, and was bf16 when the checkpoint was saved: later steps round "
        "differently from an uninterrupted run"
    )


@launched
def test_resuming_is_bitwise_identical_to_the_uninterrupted_run(on_two: dict[str, Any]) -> None:
    for name in SAVED:
        layout = name.rstrip("x")
        if layout in LOADED:
            state, resumed = on_two[f"{name}-2"], on_two[f"{name}-2 -> {layout}"]
            for key in ("digest", "scaler", "losses", "end", "end_scaler", "step"):
                assert resumed[key] == state[key], (name, key)
    for name in ("2fp16x", *OVERFLOWS_ALONE):
        overflowed = on_two[f"{name}-2"]["scaler"]
        counts = overflowed["last_overflow_iter"], overflowed["cur_hysteresis"], overflowed["cur_iter"]
        assert counts == ("1", "1", "2"), name


def manifest_of(folder: Path, name: str) -> dict[str, Any]:
    manifest = read_manifest(folder / f"{name}-2" / "step-00000002")
    assert manifest is not None
    return manifest


@launched
def test_manifest_holds_counters_dtypes_and_loss_scaler(on_two: dict[str, Any], folder: Path) -> None:
    manifest = manifest_of(folder, "2fp16x")
    engine = manifest["engine"]
    assert engine["counters"] == {"global_steps": 2, "global_samples": 16, "skipped_steps": 1, "micro_steps": 4}
    assert engine["dtypes"] == {"weights": "float16", "masters": "float32", "moments": "float32"}
    assert engine["optimizer"] == "torch.optim.adamw.AdamW"
    assert engine["loss_scaler"]["overflow"] is True
    assert {key: str(value) for key, value in engine["loss_scaler"]["fields"].items()} == {
        key: value for key, value in on_two["2fp16x-2"]["scaler"].items() if key != "dtype"
    }
    assert {parameter["step"] for parameter in manifest["parameters"].values()} == {1}
    assert manifest["parameters"]["model.norm.weight"]["shape"] == [12]
    assert manifest_of(folder, "2bf16o")["engine"]["optimizer"].endswith("DeepSpeedCPUAdam")
    assert manifest_of(folder, "1bf16")["engine"]["loss_scaler"] is None
    assert on_two["1fp32-2"]["failure"] == "CUDA error: out of memory"


@launched
@pytest.mark.parametrize("name", OVERFLOWS_ALONE)
def test_checkpoint_before_the_first_update_holds_masters_alone(
    name: str, on_two: dict[str, Any], folder: Path
) -> None:
    manifest = manifest_of(folder, name)
    assert manifest["engine"]["counters"]["skipped_steps"] == 2
    assert manifest["engine"]["dtypes"]["moments"] is None
    assert {parameter["step"] for parameter in manifest["parameters"].values()} == {None}
    assert {key.rsplit("/", 1)[1] for key in on_two[f"{name}-2"]["digest"]} == {"weight", MASTER}


@launched
def test_checkpoint_is_read_without_deepspeed(on_two: dict[str, Any], folder: Path) -> None:
    """Masters as whole tensors, by safetensors alone."""
    parts: dict[str, dict[int, NDArray[np.float32]]] = {}
    for path in sorted((folder / "3fp32-2" / "step-00000002").glob("rank-*.safetensors")):
        for key, values in load_file(path).items():
            name, kind, start = key.rsplit("/", 2)
            if kind == MASTER:
                parts.setdefault(name, {})[int(start)] = values
    parameters = manifest_of(folder, "3fp32")["parameters"]
    assert parts.keys() == parameters.keys()
    for name, pieces in parts.items():
        whole = np.concatenate([pieces[start] for start in sorted(pieces)]).reshape(parameters[name]["shape"])
        assert hashlib.sha256(whole.tobytes()).hexdigest() == on_two["3fp32-2"]["digest"][f"{name}/{MASTER}"], name


def test_state_of_another_model_is_refused(tmp_path: Path) -> None:
    saved = {"a": {"shape": [2, 3], "step": 1}, "b": {"shape": [4], "step": 1}}
    check_model(tmp_path, saved, {"a": [2, 3], "b": [4]})
    with pytest.raises(CheckpointError, match=r"holds another model: 1 parameters differ, first b"):
        check_model(tmp_path, saved, {"a": [2, 3], "b": [5]})
    with pytest.raises(CheckpointError, match=r"holds another model: 2 parameters differ, first a"):
        check_model(tmp_path, saved, {"b": [4], "c": [1], "a": [6]})


def test_another_precision_is_refused_but_another_layout_is_not() -> None:
    check_convertible(SavedLayout(2, 1, "bf16"), SavedLayout(8, 3, "bf16"))
    with pytest.raises(CheckpointError, match="saved in bf16, and this launch computes in fp32") as refused:
        check_convertible(SavedLayout(2, 1, "bf16"), SavedLayout(2, 1, "fp32"))
    assert "name=OTHER or --runs-dir DIR" in str(refused.value)


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), ranks=st.integers(1, 9))
def test_stage_3_cuts_every_parameter_into_shares_that_cover_it_once(sizes: list[int], ranks: int) -> None:
    shapes = {str(number): torch.Size([size]) for number, size in enumerate(sizes)}
    covered: dict[str, list[int]] = {}
    for rank in range(ranks):
        for piece in stage_3_pieces(shapes, rank, ranks):
            assert piece.numel > 0
            covered.setdefault(piece.name, []).extend(range(piece.start, piece.start + piece.numel))
    assert covered == {name: list(range(shape.numel())) for name, shape in shapes.items()}
