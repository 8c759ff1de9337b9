import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from inheritune_ds.errors import RecipeError, SurgeryError
from inheritune_ds.surgery.inherit import TargetModel, locate_previous
from tests.surgery import tiny
from tests.surgery.tiny import Build, SaveReference


def trained(target: TargetModel, to: Path, dtype: torch.dtype | None = None) -> Path:
    """A copy of a target with other values in every tensor, as after training."""
    shutil.copytree(target.folder, to)
    (to / "manifest.json").unlink()

    def train(tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(9)
        for name, tensor in tensors.items():
            moved = tensor.float() + torch.randn(tensor.shape, generator=generator) * 0.1
            tensors[name] = moved.to(dtype or tensor.dtype)

    tiny.edit_weights(to, train)
    if dtype is not None:
        tiny.edit_config(to, dtype=str(dtype).removeprefix("torch."))
    return to


@pytest.mark.parametrize(("small", "large"), [("first:2", "first:3"), ("3,1", "3,1,1,0"), ("even:2", "0,3,2")])
def test_trained_blocks_stay_and_the_others_come_from_the_reference(
    small: str, large: str, folder: Path, build: Build, tmp_path: Path
) -> None:
    previous = trained(build(folder, to="small", select=small), tmp_path / "trained")
    built = build(folder, select=large, previous=locate_previous(previous))
    reference, before = load_file(folder / "model.safetensors"), load_file(previous / "model.safetensors")
    target = load_file(built.folder / "model.safetensors")
    selection = built.report["selection"]
    assert built.report["previous_blocks"] == 2
    for tensor in built.report["tensors"]:
        name, block, source = tensor["name"], tensor["block"], tensor["source"]
        if block is None or block < 2:
            assert source == {"model": "previous", "tensor": name, "block": block, "file": "model.safetensors"}
            assert torch.equal(target[name], before[name]), name
        else:
            origin = name.replace(f"layers.{block}.", f"layers.{selection[block]}.")
            assert (source["model"], source["tensor"], source["block"]) == ("reference", origin, selection[block])
            assert torch.equal(target[name], reference[origin]), name
    assert not torch.equal(target["model.norm.weight"], reference["model.norm.weight"])
    assert built.report["proof"]["hidden_state"] == "equal, bit for bit"
    assert built.report["previous"]["name"] == str(previous)
    tiny.plain(built.folder)


@pytest.mark.parametrize(
    ("reference_type", "trained_type", "expected"),
    [
        ("float16", torch.float32, torch.float32),
        ("float32", torch.bfloat16, torch.float32),
        ("float16", torch.bfloat16, torch.float32),
        ("bfloat16", torch.bfloat16, torch.bfloat16),
    ],
)
def test_growth_uses_a_dtype_that_holds_both_types(  # noqa: PLR0917 - fixtures are parameters
    reference_type: str,
    trained_type: torch.dtype,
    expected: torch.dtype,
    reference_folder: SaveReference,
    build: Build,
    tmp_path: Path,
) -> None:
    folder = reference_folder("llama", dtype=reference_type)
    previous = trained(build(folder, to="small", select="first:1"), tmp_path / "trained", trained_type)
    built = build(folder, select="first:2", previous=locate_previous(previous))
    target = load_file(built.folder / "model.safetensors")
    sources = {
        "reference": load_file(folder / "model.safetensors"),
        "previous": load_file(previous / "model.safetensors"),
    }
    assert {tensor["source"]["model"] for tensor in built.report["tensors"]} == sources.keys()
    for tensor in built.report["tensors"]:
        origin = sources[tensor["source"]["model"]][tensor["source"]["tensor"]]
        found = target[tensor["name"]]
        assert found.dtype == expected
        assert torch.equal(found.double(), origin.double()), tensor["name"]  # nothing is rounded
    assert built.report["proof"]["hidden_state"] == "equal, bit for bit"


@pytest.mark.parametrize(
    ("select", "changes", "problem"),
    [
        ("first:2", {}, "has 2 blocks, and the selection keeps 2"),
        ("first:1", {}, "has 2 blocks, and the selection keeps 1"),
        ("1,2,3", {}, "it differs in its selection is [0, 1]"),
        ("first:3", {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "differs in rope_parameters"),
        ("first:3", {"rms_norm_eps": 0.5}, "it differs in rms_norm_eps"),
    ],
)
def test_a_previous_target_that_does_not_fit_is_refused(  # noqa: PLR0917 - fixtures are parameters
    select: str, changes: dict[str, Any], problem: str, folder: Path, build: Build, tmp_path: Path
) -> None:
    previous = trained(build(folder, to="small", select="first:2"), tmp_path / "trained")
    tiny.edit_config(previous, **changes)
    with pytest.raises(SurgeryError) as caught:
        build(folder, select=select, previous=locate_previous(previous))
    assert caught.value.problem.startswith(f"previous: {previous} ")
    assert problem in caught.value.problem
    assert caught.value.allowed
    assert not (tmp_path / "target").exists()


def test_growth_ignores_dropout_and_dtype(folder: Path, build: Build, tmp_path: Path) -> None:
    previous = trained(build(folder, to="small", select="first:2", dropout=0.1), tmp_path / "trained")
    tiny.edit_config(previous, use_cache=False, transformers_version="5.0", architectures=["Other"])
    assert build(folder, select="first:3", previous=locate_previous(previous)).report["previous_blocks"] == 2


def test_a_previous_target_must_have_the_same_reference(
    reference_folder: SaveReference, build: Build, tmp_path: Path
) -> None:
    folder = reference_folder("llama")
    previous = trained(build(folder, to="small", select="first:2"), tmp_path / "trained")
    random = build(folder, to="random", select="first:2", inherit="none").folder
    silent = trained(build(folder, to="small2", select="first:2"), tmp_path / "silent" / "export")
    (silent / "inheritance.json").unlink()
    with pytest.raises(SurgeryError, match="differs in its reference"):
        build(folder, select="first:3", previous=locate_previous(random))
    with pytest.raises(SurgeryError, match=r"there is no inheritance\.json in it or beside it"):
        build(folder, select="first:3", previous=locate_previous(silent))
    report = (previous / "inheritance.json").read_text(encoding="utf-8")
    (silent.parent / "inheritance.json").write_text(report, encoding="utf-8")  # as beside a run's export
    grown = build(folder, select="first:3", previous=locate_previous(silent))
    card = (grown.folder / "README.md").read_text(encoding="utf-8")
    assert f"the 2 blocks of the trained target `{silent}`" in card
    assert "then blocks [2] of" in card
    assert "grown from an earlier target and not trained since" in card
    other = reference_folder("llama", seed=6)
    with pytest.raises(SurgeryError, match="differs in its reference"):
        build(other, select="first:3", to="other", previous=locate_previous(previous))


@pytest.mark.parametrize("options", [{"inherit": "none"}, {"inherit": "paper-scripts"}, {"width": "half"}])
def test_growth_keeps_all_tensors_of_the_previous_target(
    options: dict[str, Any], reference_folder: SaveReference, build: Build, tmp_path: Path
) -> None:
    folder = reference_folder("llama", num_key_value_heads=2)
    previous = trained(build(folder, to="small", select="first:2"), tmp_path / "trained")
    with pytest.raises(SurgeryError) as caught:
        build(folder, select="first:3", previous=locate_previous(previous), **options)
    assert caught.value.problem == f"previous: {previous} can only grow with all its tensors kept"
    assert caught.value.allowed == "inherit: all and width: full"


def test_previous_is_identified_by_its_weights(reference_folder: SaveReference, build: Build, tmp_path: Path) -> None:
    small = build(reference_folder("llama"), to="small", select="first:2")
    found = locate_previous(small.folder)
    listed = json.loads((small.folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    digest = listed["model.safetensors"]["sha256"]
    assert found.weights_identity == {"name": str(small.folder), "weights_sha256": {"model.safetensors": digest}}
    tiny.edit_weights(small.folder, lambda tensors: tensors["model.norm.weight"].mul_(2))
    with pytest.raises(SurgeryError) as caught:
        locate_previous(small.folder)
    assert f"its sha256 is {tiny.contents(small.folder)['model.safetensors']}, it was {digest}" in caught.value.problem
    with pytest.raises(RecipeError, match="is no model folder"):
        locate_previous(tmp_path / "nothing")
