import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from inheritune_ds.config.inheritance import PARTS
from inheritune_ds.config.model import Reference
from inheritune_ds.errors import SurgeryError
from inheritune_ds.plan.model_size import parameters
from inheritune_ds.plan.shapes import shape_from_config
from inheritune_ds.storage.files import write_json
from inheritune_ds.surgery import compare
from inheritune_ds.surgery.compare import tensor_sha256, weights_sha256
from inheritune_ds.surgery.inherit import find_target
from inheritune_ds.surgery.reference import locate
from tests.surgery.tiny import IDENTITY, Build, SaveReference, edit_weights


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("count", [1, 3])
def test_report_and_plan_count_the_same_parameters(
    family: str, count: int, reference_folder: SaveReference, build: Build
) -> None:
    folder = reference_folder(family)
    report = build(folder, select=f"first:{count}").report
    shape = shape_from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    assert shape is not None
    expected = parameters(shape, count)
    assert (report["parameters"], report["block_parameters"]) == (expected.total, expected.blocks)


def test_weights_sha256_sees_names_dtypes_shapes_and_bits() -> None:
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    known = weights_sha256(base)
    assert weights_sha256({"b": base["b"], "a": base["a"]}) == known
    others: list[dict[str, torch.Tensor]] = [
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].view(2, 1), "b": base["b"]},
        {"a": base["a"].view(torch.int32), "b": base["b"]},
        {"a": torch.tensor([1.0, 2.0000002]), "b": base["b"]},
        {"a": torch.tensor([2.0, 1.0]), "b": base["b"]},
        {"a": base["a"]},
    ]
    assert len({known, *map(weights_sha256, others)}) == len(others) + 1
    assert tensor_sha256(base["a"].to(torch.bfloat16)) == tensor_sha256(base["a"].to(torch.bfloat16).clone())


def test_report_lists_every_tensor_with_its_source(reference_folder: SaveReference, build: Build) -> None:
    folder = reference_folder("gpt2")
    built = build(folder, select="first:2")
    tensors = load_file(built.folder / "model.safetensors")
    listed: Mapping[str, Any] = {tensor["name"]: tensor for tensor in built.report["tensors"]}
    assert len(built.report["tensors"]) == len(listed)
    assert listed.keys() == tensors.keys()  # the tied head is listed once
    for name, tensor in tensors.items():
        block = int(name.split(".")[2]) if name.startswith("transformer.h.") else None
        found = dict(listed[name])
        assert found.pop("part") in PARTS
        assert found == {
            "name": name,
            "block": block,
            "inherited": True,
            "source": {"model": "reference", "tensor": name, "block": block, "file": "model.safetensors"},
            "shape": list(tensor.shape),
            "dtype": "float32",
            "sha256": tensor_sha256(tensor),
        }
    reference = locate(Reference(model=str(folder)), Path)
    assert built.report["reference"] == {
        "name": str(folder),
        "commit": "",
        "weights_sha256": reference.weights_sha256,
        "settings_sha256": reference.settings_sha256,
    }
    assert built.report == json.loads((built.folder / "inheritance.json").read_text(encoding="utf-8"))


def test_find_target_finds_a_finished_target(reference_folder: SaveReference, build: Build) -> None:
    built = build(reference_folder("llama"), select="first:2")
    assert find_target(built.folder, IDENTITY) == built
    assert find_target(built.folder, {"recipe": "two"}) is None
    assert find_target(built.folder.parent / "elsewhere", IDENTITY) is None


@pytest.mark.parametrize("harm", ["missing", "short", "report"])
def test_find_target_ignores_a_damaged_target(harm: str, reference_folder: SaveReference, build: Build) -> None:
    built = build(reference_folder("llama"), select="first:2")
    weights = built.folder / "model.safetensors"
    if harm == "missing":
        weights.unlink()
    elif harm == "short":
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        (built.folder / "inheritance.json").write_text('{"cut sho', encoding="utf-8")
    assert find_target(built.folder, IDENTITY) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_tensor_that_is_not_finite_is_refused(
    value: float, reference_folder: SaveReference, build: Build, tmp_path: Path
) -> None:
    folder, name = reference_folder("llama"), "model.layers.3.mlp.up_proj.weight"
    edit_weights(folder, lambda tensors: tensors[name][3, 2:3].fill_(value))
    with pytest.raises(SurgeryError) as caught:
        build(folder, select="0,3")
    assert caught.value.problem == f"{name} of the reference holds a non-finite number"
    assert caught.value.action.startswith("copy or download the weights again")
    assert not (tmp_path / "target").exists()
    build(folder, select="first:3")  # it is not in it


def test_large_tensors_are_compared_and_hashed_whole(
    folder: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(folder, select="first:2").report["tensors"]
    monkeypatch.setattr(compare, "_CHUNK_BYTES", 8)
    assert build(folder, to="again", select="first:2").report["tensors"] == whole
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(folder, lambda tensors: tensors[name][-1, -1:].fill_(float("nan")))
    with pytest.raises(SurgeryError, match="non-finite"):
        build(folder, to="third", select="first:2")


@pytest.mark.parametrize(
    ("change", "is_found"),
    [
        ({"reference": {"name": "/new/model", "commit": "", "weights_sha256": {"a": "1"}}}, True),
        ({"target": {"select": "first:2", "block_scores": "new.json"}}, True),
        ({"reference": {"name": "/old/model", "commit": "", "weights_sha256": {"a": "2"}}}, False),
        ({"target": {"select": "first:3", "block_scores": "old.json"}}, False),
    ],
)
def test_find_target_compares_content_and_not_places(tmp_path: Path, change: dict[str, Any], *, is_found: bool) -> None:
    identity = {
        "reference": {"name": "/old/model", "commit": "c", "weights_sha256": {"a": "1"}},
        "target": {"select": "first:2", "block_scores": "old.json"},
    }
    write_json(tmp_path / "manifest.json", {"identity": identity, "files": {}})
    write_json(tmp_path / "inheritance.json", {})
    assert (find_target(tmp_path, {**identity, **change}) is not None) == is_found
