import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from inheritune_ds.config.model import Reference, Shape
from inheritune_ds.errors import RecipeError, SurgeryError
from inheritune_ds.surgery.load import build_config, load_config, load_model
from inheritune_ds.surgery.reference import check_shape, locate, read_config, read_shape
from tests.surgery import tiny
from tests.surgery.tiny import SaveReference

LLAMA_40 = Shape(model_type="llama", vocab_size=40, **tiny.FAMILIES["llama"])


def test_locate_identifies_a_local_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = locate(Reference(model=str(folder)), Path)
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    weights = {"model.safetensors": digests.pop("model.safetensors")}
    assert digests.keys() == {"config.json", "generation_config.json"}
    assert found.folder == folder
    assert found.identity == {"name": str(folder), "commit": "", "weights_sha256": weights, "settings_sha256": digests}
    monkeypatch.chdir(folder.parent)
    assert locate(Reference(model=folder.name), Path).folder == Path(folder.name)


def test_locate_finds_the_export_of_a_recipe(reference_folder: SaveReference) -> None:
    folder = reference_folder("gpt2")
    found = locate(Reference(model="recipe:the-deep-one"), {"the-deep-one": folder}.__getitem__)
    assert (found.name, found.folder) == ("recipe:the-deep-one", folder)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "it is no model folder: {} is missing"),
        (b"{'model_type': 1}", "{} is not JSON: Expecting"),
        (b'{"model_type": "\xff"}', "{} is not JSON: "),
        (b"[]", "{} is not a JSON object"),
        (b"null", "{} is not a JSON object"),
    ],
)
def test_read_config_refuses_a_missing_or_invalid_config(text: bytes | None, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(RecipeError) as caught:
        read_config(tmp_path, "it")
    assert caught.value.problem.startswith(f"reference.model: {problem.format(path)}")
    assert text is not None or "or recipe:NAME" in caught.value.allowed


def test_load_model_reads_pickled_weights_as_well(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    state = tiny.make_model("llama").state_dict()
    torch.save(state, folder / "pytorch_model.bin")
    assert locate(Reference(model=str(folder)), Path).weights_sha256.keys() == {"pytorch_model.bin"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in load_model(folder).state_dict().items())


def test_load_model_keeps_or_changes_the_dtype(reference_folder: SaveReference) -> None:
    folder = reference_folder("llama", dtype="float16")
    assert load_model(folder).dtype == torch.float16
    assert load_model(folder, dtype="float32").dtype == torch.float32


def test_load_model_never_fills_in_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    for name in ("model.norm.weight", "model.layers.2.mlp.up_proj.weight"):
        del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SurgeryError) as caught:
        load_model(folder)
    assert caught.value.problem == (
        f"{folder} lacks 2 weights that its config asks for: model.layers.2.mlp.up_proj.weight, model.norm.weight"
    )
    assert "never filled in at random" in caught.value.action


@pytest.mark.parametrize("harm", ["no family", "cut short"])
def test_load_model_says_what_cannot_be_loaded(harm: str, folder: Path) -> None:
    if harm == "no family":
        (folder / "config.json").write_text('{"model_type": "no-such-family"}', encoding="utf-8")
    else:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(SurgeryError) as caught:
        load_model(folder)
    assert caught.value.problem.startswith(f"{folder} cannot be loaded as a causal language model: ")


def test_a_file_of_the_hub_s_cache_is_compared_with_its_blob(folder: Path, tmp_path: Path) -> None:
    weights, blobs = folder / "model.safetensors", tmp_path / "blobs"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    blobs.mkdir()
    weights.rename(blobs / digest)
    weights.symlink_to(blobs / digest)
    assert locate(Reference(model=str(folder)), Path).weights_sha256 == {"model.safetensors": digest}
    content = bytearray((blobs / digest).read_bytes())
    content[-1] ^= 1
    (blobs / digest).write_bytes(content)
    with pytest.raises(SurgeryError) as caught:
        locate(Reference(model=str(folder)), Path)
    other = hashlib.sha256(content).hexdigest()
    assert caught.value.problem == f"{weights} is damaged: its sha256 is {other}, it was {digest}"
    assert caught.value.action == "delete the file and download it again"


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        "{",
        '{"files": 3}',
        '{"files": {"model.safetensors": 3}}',
        '{"files": {"model.safetensors": {"sha256": 3}}}',
        '{"files": {"other": {"sha256": "0"}}}',
    ],
)
def test_an_invalid_manifest_is_ignored(manifest: str, folder: Path) -> None:
    (folder / "manifest.json").write_text(manifest, encoding="utf-8")
    assert locate(Reference(model=str(folder)), Path).weights_sha256.keys() == {"model.safetensors"}


def test_shards_are_compared_with_the_manifest(folder: Path) -> None:
    first, second = tiny.shard(folder)
    described = {path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in (first, second)}
    (folder / "manifest.json").write_text(json.dumps({"files": described}), encoding="utf-8")
    assert len(locate(Reference(model=str(folder)), Path).weights_sha256) == 2
    second.write_bytes(first.read_bytes())
    with pytest.raises(SurgeryError, match=rf"{second.name} is damaged: its sha256 is "):
        locate(Reference(model=str(folder)), Path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": None}, "key 'hidden_size' is missing"),
        ({"vocab_size": 0}, "vocab_size: Input should be greater than 0"),
        ({"num_attention_heads": 3, "head_dim": None}, "hidden_size 16 is not a multiple of num_attention_heads 3"),
        ({"rope_parameters": {"rope_theta": "x"}}, "could not convert string to float: 'x'"),
    ],
)
def test_read_shape_names_an_invalid_size(changes: dict[str, Any], reason: str, folder: Path) -> None:
    tiny.edit_config(folder, **changes)
    with pytest.raises(SurgeryError) as caught:
        read_shape(read_config(folder, "it"), "it")
    assert caught.value.problem == f"it does not describe a model: {reason}"
    assert caught.value.allowed == "a complete config.json as save_pretrained writes it"


def test_check_shape_names_another_family() -> None:
    with pytest.raises(RecipeError, match="model_type: recipe llama, model opt; vocab_size: recipe 40, model None"):
        check_shape(LLAMA_40, {"model_type": "opt"}, "it")


SIZES = LLAMA_40.model_dump(exclude={"intermediate_size", "num_key_value_heads"})
GPT2 = {**SIZES, "model_type": "gpt2", "tie_word_embeddings": True, "scale_attn_by_inverse_layer_idx": True}


@pytest.mark.parametrize("shape", [LLAMA_40, Shape(**GPT2)], ids=["llama", "gpt2"])
def test_check_shape_accepts_the_shape_of_a_saved_model(shape: Shape, reference_folder: SaveReference) -> None:
    check_shape(shape, read_config(reference_folder(shape.model_type), "it"), "it")


def test_build_config_uses_every_field_of_the_shape() -> None:
    shape = LLAMA_40.model_copy(update={"rope_theta": 5e5, "rms_norm_eps": 1e-3, "tie_word_embeddings": True})
    config = build_config(shape)
    assert (
        config.to_dict().items()
        >= {
            **shape.model_dump(exclude={"rope_theta", "scale_attn_by_inverse_layer_idx"}),
            "bos_token_id": None,
            "eos_token_id": None,
        }.items()
    )
    rope = AutoModelForCausalLM.from_config(config).model.rotary_emb
    assert rope.inv_freq.tolist() == pytest.approx([5e5 ** (-2 * i / 8) for i in range(4)])


@pytest.mark.parametrize("kind", ["own", "my_llama", "stablelm_epoch"])
def test_load_never_runs_remote_code_and_does_not_advise_to(kind: str, folder: Path) -> None:
    tiny.edit_config(folder, model_type=kind, auto_map={"AutoConfig": "evil.Config"})
    (folder / "evil.py").write_text("raise SystemExit('ran')\n", encoding="utf-8")
    for load in (load_config, load_model):
        with pytest.raises(SurgeryError, match="the code that comes with a model is never run") as caught:
            load(folder)
        assert f"no model_type '{kind}'" in caught.value.problem
        assert "trust_remote_code" not in str(caught.value)
        assert "convert this one to a class of transformers" in caught.value.action


LIBRARY = [
    ("Error no file named model.safetensors found in directory x.", "You should use `from_tf=True` to load it."),
    ("The repository x has no config.", "Please pass the argument `trust_remote_code=True` to allow custom code."),
    ("This needs a package that is missing.", "You can install it with `pip install tiktoken`."),
    (
        "Can't load the configuration of 'x'.",
        "Is it from 'https://huggingface.co/models'? If so, make sure",
    ),
    ("Consistency check failed: file should be of size 5.", "We are sorry. Please retry with `force_download=True`."),
]


@pytest.mark.parametrize(("fact", "advice"), LIBRARY)
def test_advice_of_transformers_is_not_repeated(
    fact: str, advice: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig

    def fail(*_: object, **__: object) -> None:
        raise OSError(f"{fact} {advice}\n{advice}")

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    with pytest.raises(SurgeryError) as caught:
        load_config(folder)
    shown = caught.value.problem.removeprefix(f"{folder / 'config.json'} cannot be loaded: ")
    assert shown.removesuffix(" We are sorry. We are sorry.") == fact


OTHERS = [
    (
        "adapter_config.json",
        '{"base_model_name_or_path": "org/base"}',
        "an adapter of org/base",
        "org/base",
    ),
    ("adapter_config.json", "{}", "an adapter", "its base model"),
    ("llama-7b.Q4_K_M.gguf", "GGUF", "a GGUF model", "converted from"),
    ("global_step500/mp_rank_00_model_states.pt", "", "a checkpoint of DeepSpeed", "zero_to_fp32.py"),
    ("mp_rank_00_model_states.pt", "", "a checkpoint of DeepSpeed", "zero_to_fp32.py"),
    ("zero_to_fp32.py", "", "a checkpoint of DeepSpeed", "zero_to_fp32.py"),
    ("consolidated.00.pth", "", "a checkpoint of Meta's code", "convert_llama_weights_to_hf.py"),
    ("export/config.json", "{}", "a run folder", "export"),
    ("checkpoint-500/config.json", "{}", "an output folder of Hugging Face's Trainer", "checkpoint-"),
    ("__0_0.distcp", "", "a distributed checkpoint of torch", "save_pretrained"),
]


@pytest.mark.parametrize(("file", "content", "kind", "action"), OTHERS, ids=[case[0] for case in OTHERS])
@pytest.mark.parametrize("config", [False, True])
def test_a_folder_without_a_model_is_called_what_it_is(  # noqa: PLR0917 - fixtures are parameters
    file: str,
    content: str,
    kind: str,
    action: str,
    config: bool,  # noqa: FBT001
    tmp_path: Path,
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content, encoding="utf-8")
    if config:
        (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        locate(Reference(model=str(tmp_path)), Path)
    assert caught.value.problem == f"reference.model: {tmp_path} is {kind}, not a model folder"
    assert action in caught.value.action


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
        (b"<html></html>", "an HTML page"),
        ("{}".encode("utf-8-sig"), "text with a byte order mark"),
        (b"", "empty"),
    ],
)
def test_a_config_of_another_kind_is_named(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        locate(Reference(model=str(tmp_path)), Path)
    assert f"{tmp_path / 'config.json'} is {what}" in caught.value.problem
    assert caught.value.action
