from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from inheritune_ds.config.model import Shape
from inheritune_ds.errors import CorpusError, SurgeryError
from inheritune_ds.plan.model_size import parameters
from inheritune_ds.plan.shapes import shape_from_config
from inheritune_ds.surgery import inherit, verify
from inheritune_ds.surgery.compare import weights_sha256
from inheritune_ds.surgery.load import load_config, load_model
from inheritune_ds.surgery.write_shards import write_shards
from tests.surgery.tiny import PATHS, TIED, WIDE, Build, SaveReference, block_output, contents, plain


@pytest.mark.parametrize("family", PATHS)
@pytest.mark.parametrize("count", [1, 3, 4])
def test_target_holds_the_reference_s_tensors_ties_and_block_numbers_and_computes_its_hidden_state(
    family: str, count: int, reference_folder: SaveReference, build: Build
) -> None:
    folder = reference_folder(family)
    reference, target = plain(folder), plain(build(folder, select=f"first:{count}").folder)
    path = PATHS[family]
    source, own = reference.state_dict(), target.state_dict()
    assert own.keys() == {
        name for name in source if not any(name.startswith(f"{path}.{index}.") for index in range(count, 4))
    }
    for name, tensor in own.items():
        assert torch.equal(tensor, source[name]), name
        assert tensor.unique().numel() > 1, name
    assert target.config.num_hidden_layers == count
    block = f"{path}.{count - 1}"
    assert torch.equal(block_output(target, block), block_output(reference, block))
    found = {name: m.layer_idx for name, m in target.named_modules() if isinstance(getattr(m, "layer_idx", None), int)}
    if family in ("gpt2", "llama", "qwen2", "smollm3"):
        assert found
    for name, index in found.items():
        assert name.startswith(f"{path}.{index}"), name
    head, embedding = target.get_output_embeddings(), target.get_input_embeddings()
    assert (head.weight is embedding.weight) == (family in TIED)


@pytest.mark.parametrize(
    ("select", "order"), [("1,3", (1, 3)), ("3,0,2", (3, 0, 2)), ("0-1,0-1", (0, 1, 0, 1)), ("last:2", (2, 3))]
)
def test_target_has_the_blocks_of_any_selection(
    select: str, order: tuple[int, ...], folder: Path, build: Build
) -> None:
    built = build(folder, select=select)
    source, own = plain(folder).state_dict(), plain(built.folder).state_dict()
    sources = {tensor["name"]: tensor["source"]["tensor"] for tensor in built.report["tensors"]}
    for name, tensor in own.items():
        head, _, rest = name.partition("model.layers.")
        expected = f"model.layers.{order[int(rest[0])]}{rest[1:]}" if not head and rest else name
        assert torch.equal(tensor, source[expected]), name
        assert sources[name] == expected
    assert built.report["selection"] == list(order)
    assert own["model.layers.0.mlp.up_proj.weight"].data_ptr() != own["model.layers.1.mlp.up_proj.weight"].data_ptr()


def test_the_reference_is_never_changed(reference_folder: SaveReference, build: Build) -> None:
    folder = reference_folder("smollm3", attention_dropout=0.25)
    before, values = contents(folder), load_config(folder).to_dict()
    build(folder, select="first:2")
    assert values["no_rope_layers"] == [1, 1, 1, 0]
    assert load_config(folder).to_dict() == values
    assert contents(folder) == before


def test_target_s_config_is_cut_and_says_its_dropout(reference_folder: SaveReference, build: Build) -> None:
    folder = reference_folder("gpt2", attn_pdrop=0.3, resid_pdrop=0.2)
    config = load_config(build(folder, select="first:2", dropout=0.125).folder)
    assert (config.n_layer, config.num_hidden_layers) == (2, 2)
    assert (config.attn_pdrop, config.resid_pdrop, config.embd_pdrop) == (0.125, 0.125, 0.125)
    assert config.scale_attn_by_inverse_layer_idx is True
    none = load_config(build(folder, to="other", select="first:2").folder)
    assert (none.attn_pdrop, none.resid_pdrop, none.embd_pdrop) == (0.0, 0.0, 0.0)
    rotary = load_config(build(reference_folder("smollm3"), to="rotary", select="first:3").folder)
    assert (rotary.no_rope_layers, rotary.layer_types) == ([1, 1, 1], ["full_attention"] * 3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_target_keeps_the_reference_s_dtype(dtype: str, reference_folder: SaveReference, build: Build) -> None:
    folder = reference_folder("llama", dtype=dtype)
    built = build(folder, select="first:2")
    target = plain(built.folder)
    assert {str(tensor.dtype) for tensor in target.state_dict().values()} == {f"torch.{dtype}"}
    assert {tensor["dtype"] for tensor in built.report["tensors"]} == {dtype}
    source = plain(folder).state_dict()
    assert all(torch.equal(tensor, source[name]) for name, tensor in target.state_dict().items())


def test_inherit_none_uses_only_the_shape(folder: Path, build: Build) -> None:
    inherited = build(folder, select="first:3")
    built = build(folder, to="fresh", select="first:3", inherit="none")
    source, fresh = plain(folder).state_dict(), plain(built.folder).state_dict()
    assert {n: t.shape for n, t in fresh.items()} == {
        n: t.shape for n, t in plain(inherited.folder).state_dict().items()
    }
    assert not any(torch.equal(tensor, source[name]) for name, tensor in fresh.items())
    report = built.report
    assert (report["reference"], report["inherit"], report["selection"]) == (None, "none", [0, 1, 2])
    assert [(tensor["inherited"], tensor["source"]) for tensor in report["tensors"]] == [(False, None)] * len(fresh)


def test_fresh_values_depend_on_the_seed_alone(folder: Path, build: Build) -> None:
    def weights(seed: int, disturbance: int) -> str:
        torch.manual_seed(disturbance)
        torch.rand(disturbance)
        built = build(folder, to=f"{seed}-{disturbance}", select="first:2", inherit="none", seed=seed)
        return weights_sha256(plain(built.folder).state_dict())

    assert weights(1, 7) == weights(1, 8)
    assert weights(1, 7) != weights(2, 7)


SCRATCH: dict[str, Any] = {**WIDE, "vocab_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"tie_word_embeddings": True, "scale_attn_by_inverse_layer_idx": True},
    "llama": {"num_key_value_heads": 2},
}


@pytest.mark.parametrize("family", OWN)
def test_target_from_scratch_has_the_recipe_s_shape(family: str, build: Build) -> None:
    shape = Shape(**{**SCRATCH, **OWN[family], "model_type": family, "rms_norm_eps": 1e-4, "rope_theta": 500.0})
    built = build(None, shape=shape, words=50)
    config = load_config(built.folder)
    found = shape_from_config(config.to_dict())
    assert found is not None
    ignored = {"num_key_value_heads", "rms_norm_eps", "rope_theta"} if family == "gpt2" else set()
    assert found.model_dump(exclude=ignored) == shape.model_dump(exclude=ignored)
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)  # the tokenizer's: GPT-2's own lie outside 64 words
    assert (built.report["reference"], built.report["selection"], built.report["blocks"]) == (None, [], 3)
    assert plain(built.folder).generation_config.eos_token_id == 2
    assert built.report["parameters"] == parameters(shape).total


def test_build_target_replaces_an_older_one(folder: Path, build: Build) -> None:
    first = build(folder, select="first:2")
    (first.folder / "left-over").touch()
    second = build(folder, select="first:3")
    assert second.folder == first.folder
    assert not (second.folder / "left-over").exists()
    assert load_config(second.folder).num_hidden_layers == 3


def test_build_target_refuses_a_tokenizer_with_more_entries_than_embeddings(
    folder: Path, build: Build, tmp_path: Path
) -> None:
    build(folder, to="just", select="first:2", words=40)
    with pytest.raises(CorpusError) as caught:
        build(folder, select="first:2", words=41)
    assert caught.value.problem.endswith("row in the model's embeddings, which have 40: w36 (id 40)")
    assert caught.value.allowed == "tokens with ids below 40, except special tokens that are in no text"
    assert "set corpus.tokenizer" in caught.value.action
    assert not (tmp_path / "target").exists()


def test_build_target_publishes_nothing_that_does_not_read_back(
    folder: Path, build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:

    def write_wrongly(where: Path, *arguments: Any) -> None:
        write_shards(where, *arguments)
        tensors = load_file(where / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 2] += 2.0**-12
        save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(inherit, "write_shards", write_wrongly)
    message = r"^model\.layers\.1\.mlp\.up_proj\.weight was not written as it was read"
    with pytest.raises(SurgeryError, match=message) as caught:
        build(folder, select="first:2")
    assert caught.value.action == "check the disk, then rerun the same command"
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]


def test_build_target_publishes_nothing_that_computes_something_else(
    folder: Path, build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:

    def load_otherwise(where: Path, **options: Any) -> PreTrainedModel:
        model = load_model(where, **options)
        with torch.no_grad():
            model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 2] += 2.0**-12
        return model

    monkeypatch.setattr(verify, "load_model", load_otherwise)
    with pytest.raises(SurgeryError, match=r"kept blocks by up to \d") as caught:
        build(folder, select="0,2")
    assert caught.value.problem.startswith("the target's hidden state differs from that of the reference's kept blocks")
    assert caught.value.action.endswith("nothing was published")
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]


def test_build_target_checks_the_budget_s_count(folder: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = build(folder, select="first:2").report
    monkeypatch.setattr(verify, "read_shape", lambda values, _: shape_from_config({**values, "vocab_size": 41}))
    with pytest.raises(SurgeryError) as caught:
        build(folder, select="first:2", to="other")
    found, wrong = honest["parameters"], honest["parameters"] + 2 * 16
    assert honest["proof"]["budget_parameters"] == found
    assert caught.value.problem == f"the target has {found:,} parameters, the plan's arithmetic gives {wrong:,}"
