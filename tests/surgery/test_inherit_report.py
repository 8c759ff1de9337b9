import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from inheritune_ds.budget import parameters
from inheritune_ds.recipe import Reference, shape_from_config
from inheritune_ds.surgery.inherit import TargetModel, find_target, tensor_sha256, weights_sha256
from inheritune_ds.surgery.reference import load_model, locate

IDENTITY = {"recipe": "one"}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("count", [1, 3])
def test_report_counts_what_the_budget_counts(
    family: str, count: int, reference_folder: Callable[..., Path], build: Callable[..., TargetModel]
) -> None:
    folder = reference_folder(family)
    report = build(folder, select=f"first:{count}").report
    shape = shape_from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    assert shape is not None
    expected = parameters(shape, count)
    assert (report["parameters"], report["block_parameters"]) == (expected.total, expected.blocks)


def test_report_lists_every_tensor_with_its_source(
    reference_folder: Callable[..., Path], build: Callable[..., TargetModel]
) -> None:
    folder = reference_folder("gpt2")
    built = build(folder, select="first:2")
    state = load_model(built.folder).state_dict()
    listed: Mapping[str, Any] = {tensor["name"]: tensor for tensor in built.report["tensors"]}
    assert list(listed) == list(state)
    for name, tensor in state.items():
        block = int(name.split(".")[2]) if name.startswith("transformer.h.") else None
        assert listed[name] == {
            "name": name,
            "block": block,
            "inherited": True,
            "source": name,
            "shape": list(tensor.shape),
            "dtype": "float32",
            "sha256": tensor_sha256(tensor),
        }
    reference = locate(Reference(model=str(folder)), Path)
    assert built.report["reference"] == {
        "name": str(folder),
        "commit": "",
        "weights_sha256": reference.weights_sha256,
    }
    assert built.report == json.loads((built.folder / "inheritance.json").read_text(encoding="utf-8"))


def test_find_target_finds_its_own_finished_work(
    reference_folder: Callable[..., Path], build: Callable[..., TargetModel]
) -> None:
    built = build(reference_folder("llama"), select="first:2")
    assert find_target(built.folder, IDENTITY) == built
    assert find_target(built.folder, {"recipe": "two"}) is None
    assert find_target(built.folder.parent / "elsewhere", IDENTITY) is None


@pytest.mark.parametrize("harm", ["missing", "short", "report"])
def test_find_target_does_not_take_a_damaged_one(
    harm: str, reference_folder: Callable[..., Path], build: Callable[..., TargetModel]
) -> None:
    built = build(reference_folder("llama"), select="first:2")
    weights = built.folder / "model.safetensors"
    if harm == "missing":
        weights.unlink()
    elif harm == "short":
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        (built.folder / "inheritance.json").write_text('{"cut sho', encoding="utf-8")
    assert find_target(built.folder, IDENTITY) is None


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
