from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

from inheritune_ds.errors import SurgeryError
from inheritune_ds.surgery import tensor_map
from inheritune_ds.surgery.blocks import part_of
from inheritune_ds.surgery.load import load_config
from inheritune_ds.surgery.tensor_map import SourceModel
from tests.surgery import tiny
from tests.surgery.tiny import Build, SaveReference, make_model, plain

Tensors = dict[str, torch.Tensor]
HINT = "download both from the same place again; missing weights are never filled in at random"


def source(folder: Path) -> SourceModel:
    return SourceModel("reference", folder, load_config(folder))


def refused(folder: Path) -> list[str]:
    """Lines of the error for a contradiction between config and weights."""
    with pytest.raises(SurgeryError) as caught:
        source(folder)
    first, *lines = caught.value.problem.split("\n")
    assert first == "the config contradicts the weights:"
    assert caught.value.action == HINT
    return [line.strip() for line in lines]


MASKS = {f"transformer.h.{block}.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.uint8) for block in range(4)}


@pytest.mark.parametrize(
    ("family", "more"),
    [("gpt2", MASKS), ("llama", {"v_head.weight": torch.ones(1, 16)})],
    ids=["leftovers of older versions", "outside the blocks"],
)
def test_tensors_without_a_place_are_dropped_and_reported(
    family: str, more: Tensors, reference_folder: SaveReference, build: Build
) -> None:
    folder = reference_folder(family)
    tiny.edit_weights(folder, lambda tensors: tensors.update(more))
    built = build(folder, select="first:2")
    assert built.report["left_out"] == sorted(more)
    assert not more.keys() & load_file(built.folder / "model.safetensors").keys()
    plain(built.folder)


def test_files_without_the_model_s_prefix_keep_their_names(reference_folder: SaveReference, build: Build) -> None:
    folder = reference_folder("gpt2")
    expected = plain(folder).state_dict()
    path = folder / "model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(bare, path, metadata={"format": "pt"})
    built = build(folder, select="first:3")
    assert {tensor["name"] for tensor in built.report["tensors"]} == {
        name for name in bare if not name.startswith("h.3.")
    }
    for name, tensor in plain(built.folder).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def pickled(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Save the weights as a pickle file with the tied head, as older versions did."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_a_copied_tied_head_is_skipped(reference_folder: SaveReference, build: Build) -> None:
    folder = reference_folder("gpt2")
    pickled(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"].clone()}))
    built = build(folder, select="first:2")
    assert built.report["left_out"] == ["lm_head.weight"]
    target = plain(built.folder)
    assert target.get_output_embeddings().weight is target.get_input_embeddings().weight


def test_a_tied_head_that_is_no_copy_is_refused(reference_folder: SaveReference) -> None:
    folder = reference_folder("gpt2")
    pickled(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"] + 1}))
    assert refused(folder) == ["lm_head.weight differs from transformer.wte.weight, but the config ties them"]


@pytest.mark.parametrize(("family", "embedding"), [("gpt2", "transformer.wte"), ("llama", "model.embed_tokens")])
@pytest.mark.parametrize("inherit", ["all", "mlp-only", "paper-scripts"])
def test_a_tied_head_alone_is_the_embedding(
    family: str, embedding: str, inherit: str, reference_folder: SaveReference, build: Build
) -> None:
    folder = reference_folder(family, tie_word_embeddings=True)
    path = folder / "model.safetensors"
    path.unlink()
    save_model(make_model(family, tie_word_embeddings=True), str(path), metadata={"format": "pt"})
    origin = load_file(path)
    assert f"{embedding}.weight" not in origin  # else this tests nothing
    built = build(folder, select="first:2", inherit=inherit)
    target = plain(built.folder)
    assert torch.equal(target.state_dict()[f"{embedding}.weight"], origin["lm_head.weight"])
    assert target.get_output_embeddings().weight is target.get_input_embeddings().weight
    entry = next(tensor for tensor in built.report["tensors"] if tensor["name"] == f"{embedding}.weight")
    assert entry["part"] == "token_embeddings"
    assert (entry["source"]["tensor"], entry["source"]["file"]) == ("lm_head.weight", "model.safetensors")
    assert (built.report["proof"]["hidden_state"] is None) == (inherit == "mlp-only")


@pytest.mark.parametrize(
    ("family", "config", "expected"),
    [
        ("llama", {"num_hidden_layers": 3}, "model.layers.3.input_layernorm.weight belongs to no block of the config"),
        ("llama", {"num_hidden_layers": 5}, "model.layers.4.input_layernorm.weight is not in the files"),
        ("gpt2", {"n_layer": 3}, "transformer.h.3.attn.c_attn.weight belongs to no block of the config"),
        ("llama", {"hidden_size": 32}, "lm_head.weight has shape [40, 16], the config asks for [40, 32]"),
        ("llama", {"vocab_size": 41}, "lm_head.weight has shape [40, 16], the config asks for [41, 16]"),
        (
            "llama",
            {"intermediate_size": 32},
            "model.layers.0.mlp.down_proj.weight has shape [16, 24], the config asks for [16, 32]",
        ),
        (
            "llama",
            {"num_key_value_heads": 2},
            "model.layers.0.self_attn.k_proj.weight has shape [8, 16], the config asks for [16, 16]",
        ),
        ("llama", {"attention_bias": True}, "model.layers.0.self_attn.k_proj.bias is not in the files"),
        ("llama", {"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens.weight"),
        ("qwen2", {"tie_word_embeddings": False}, "lm_head.weight is not in the files"),
        ("gpt2", {"n_positions": 16}, "transformer.wpe.weight has shape [32, 16], the config asks for [16, 16]"),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(
    family: str, config: dict[str, Any], expected: str, reference_folder: SaveReference
) -> None:
    folder = reference_folder(family)
    tiny.edit_config(folder, **config)
    assert refused(folder)[0].startswith(expected)


def test_a_bias_that_the_config_does_not_have_is_refused(reference_folder: SaveReference) -> None:
    folder = reference_folder("llama", attention_bias=True)
    tiny.edit_config(folder, attention_bias=False)
    lines = refused(folder)
    assert lines[0] == "model.layers.0.self_attn.k_proj.bias belongs to no block of the config"
    assert lines[-1] == "and 11 more"  # four biases in each of four blocks; five lines are shown


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, "is not in the files"),
        ({"norm.weight": torch.zeros(16)}, f"and norm.weight are both {NORM} of the model"),
        ({NORM: torch.arange(16, dtype=torch.int32)}, "holds numbers of type int32, the model's are floating point"),
        ({NORM: torch.tensor(1.0)}, "has shape [], the config asks for [16]"),
    ],
    ids=["missing", "double", "whole numbers", "scalar"],
)
def test_tensors_that_are_not_the_model_s_are_refused(more: Tensors, expected: str, folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors.update(more)
        if not more:
            del tensors[NORM]

    tiny.edit_weights(folder, change)
    assert refused(folder) == [f"{NORM} {expected}"]


def test_quantized_types_are_refused(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tiny.edit_weights(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(SurgeryError) as caught:
        source(folder)
    assert caught.value.problem == (
        f"the reference's weights are quantized: {folder} holds tensors of torch.float8_e4m3fn"
    )
    assert "BF16" in caught.value.allowed


def test_every_tensor_keeps_its_own_type(reference_folder: SaveReference, build: Build) -> None:
    folder = reference_folder("llama", dtype="bfloat16")
    tiny.edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.linspace(0.1, 0.7, 16)}))
    built = build(folder, select="1,3")
    own = load_file(built.folder / "model.safetensors")
    assert {name for name, tensor in own.items() if tensor.dtype == torch.float32} == {"model.norm.weight"}
    assert torch.equal(own["model.norm.weight"], torch.linspace(0.1, 0.7, 16))
    assert built.report["proof"]["dtype"] == "bfloat16"


def test_a_tensor_of_no_part_needs_inherit_all(folder: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    known = part_of
    monkeypatch.setattr(tensor_map, "part_of", lambda *given: known(*given) if "up_proj" not in given[2] else "")
    with pytest.raises(SurgeryError) as caught:
        build(folder, select="first:2", inherit="mlp-only")
    assert caught.value.problem.endswith(
        " of a llama model belongs to none of the parts that can be inherited separately"
    )
    assert caught.value.allowed == "inherit: all"
    tensors = build(folder, select="first:2").report["tensors"]
    assert {tensor["part"] == "" for tensor in tensors if "up_proj" in tensor["name"]} == {True}
