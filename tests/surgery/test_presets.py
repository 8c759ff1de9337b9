"""Which tensors each preset leaves fresh, as explicit lists.

`paper-scripts` leaves the same tensors at their initial values as the published scripts (LLM-Inheritune, commit
560611d: lit-gpt/Training/train.py, GPT2-experiments/train_iniheritune.py): token embeddings and final norm of LLaMA,
position embeddings and final norm of GPT-2, whose head is tied. The ablations are those of the paper's table 3:
attention with its norm, MLP with its norm, both without norms.
"""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from inheritune_ds.errors import SurgeryError
from tests.surgery.families import random_model
from tests.surgery.tiny import Build, SaveReference, cut, plain


def in_blocks(path: str, *names: str) -> list[str]:
    """Names of tensors of both kept blocks."""
    return [f"{path}.{block}.{name}" for block in (0, 1) for name in names]


LLAMA_OUTER = ["model.embed_tokens.weight", "model.norm.weight"]
LLAMA_ATTENTION = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
LLAMA_MLP = [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
LLAMA_NORMS = ["input_layernorm.weight", "post_attention_layernorm.weight"]
LLAMA: dict[str, list[str]] = {
    "all": [],
    "paper-scripts": LLAMA_OUTER,
    "attention-only": [*LLAMA_OUTER, *in_blocks("model.layers", LLAMA_NORMS[1], *LLAMA_MLP)],
    "mlp-only": [*LLAMA_OUTER, *in_blocks("model.layers", LLAMA_NORMS[0], *LLAMA_ATTENTION)],
    "attention-mlp": [*LLAMA_OUTER, *in_blocks("model.layers", *LLAMA_NORMS)],
}
GPT2_OUTER = ["transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"]
GPT2_ATTENTION = [f"attn.{name}.{kind}" for name in ("c_attn", "c_proj") for kind in ("weight", "bias")]
GPT2_MLP = [f"mlp.{name}.{kind}" for name in ("c_fc", "c_proj") for kind in ("weight", "bias")]
GPT2_NORMS = [["ln_1.weight", "ln_1.bias"], ["ln_2.weight", "ln_2.bias"]]
GPT2: dict[str, list[str]] = {
    "all": [],
    "paper-scripts": GPT2_OUTER,
    "attention-only": [*GPT2_OUTER, *in_blocks("transformer.h", *GPT2_NORMS[1], *GPT2_MLP)],
    "mlp-only": [*GPT2_OUTER, *in_blocks("transformer.h", *GPT2_NORMS[0], *GPT2_ATTENTION)],
    "attention-mlp": [*GPT2_OUTER, *in_blocks("transformer.h", *GPT2_NORMS[0], *GPT2_NORMS[1])],
}
CASES = [("llama", preset, fresh) for preset, fresh in LLAMA.items()]
CASES += [("gpt2", preset, fresh) for preset, fresh in GPT2.items()]
START = {
    ("llama", "paper-scripts"): "the target's own embeddings",
    ("gpt2", "paper-scripts"): "the target's own embeddings",  # its position embeddings are fresh
    ("llama", "all"): "the reference's embeddings",
    ("gpt2", "all"): "the reference's embeddings",
}
TABLE = "roformer.encoder.embed_positions"  # sines, the same in every model


@pytest.mark.parametrize(("family", "preset", "fresh"), CASES, ids=[f"{case[0]} {case[1]}" for case in CASES])
def test_preset_leaves_the_same_tensors_fresh_as_the_published_scripts(
    family: str, preset: str, fresh: list[str], reference_folder: SaveReference, build: Build
) -> None:
    folder = reference_folder(family)
    built = build(folder, select="first:2", inherit=preset, seed=7)
    report = built.report
    assert {tensor["name"] for tensor in report["tensors"] if not tensor["inherited"]} == set(fresh)
    assert {tensor["name"] for tensor in report["tensors"] if tensor["source"] is None} == set(fresh)
    reference, target = load_file(folder / "model.safetensors"), load_file(built.folder / "model.safetensors")
    other = build(folder, to="random", select="first:2", inherit="none", seed=7)
    random = load_file(other.folder / "model.safetensors")
    for name, tensor in target.items():
        assert torch.equal(tensor, random[name] if name in fresh else reference[name]), name
        assert not torch.equal(random[name], reference[name]), name
    kept = [target[name].numel() for name in target if name not in fresh]
    assert report["inherited_parameters"] == sum(kept)
    assert report["parameters"] == sum(tensor.numel() for tensor in target.values())
    assert report["inherit"] == preset
    if (family, preset) in START:
        assert report["proof"]["hidden_state"] == "equal, bit for bit"
        assert report["proof"]["hidden_state_start"] == START[family, preset]
    else:
        assert report["proof"]["hidden_state"] is None
        assert report["proof"]["hidden_state_reason"] == "not comparable: fresh tensors in the blocks"
    plain(built.folder)


@pytest.mark.parametrize(
    ("family", "parts", "inherited"),
    [
        ("gpt2", ["token_embeddings"], {"wte"}),
        ("gpt2", ["head"], {"wte"}),  # tied: one tensor
        ("gpt2", ["position_embeddings", "norms"], {"wpe", "ln_1", "ln_2"}),
        ("llama", ["token_embeddings"], {"embed_tokens"}),
        ("llama", ["head", "mlp"], {"lm_head", "mlp"}),
        ("llama", ["final_norm", "mlp_norms"], {"norm", "post_attention_layernorm"}),
        ("llama", ["attention_norms", "attention"], {"input_layernorm", "self_attn"}),
    ],
)
def test_a_list_of_parts_leaves_the_others_fresh(
    family: str, parts: list[str], inherited: set[str], reference_folder: SaveReference, build: Build
) -> None:
    report = build(reference_folder(family), select="first:2", inherit=parts).report
    kinds: dict[bool, set[str]] = {True: set(), False: set()}
    for tensor in report["tensors"]:
        kind = re.sub(r"^(model|transformer)\.((layers|h)\.\d\.)?", "", tensor["name"]).partition(".")[0]
        kinds[tensor["inherited"]].add(kind)
    assert kinds[True] == inherited
    assert len(kinds[False]) == 7 - len(inherited)
    assert report["inherit"] == parts


@pytest.mark.parametrize(
    ("family", "inherit", "lacking"),
    [
        ("llama", ["position_embeddings", "mlp"], "position_embeddings"),
        ("mamba", "mlp-only", "mlp"),
        ("mamba", "attention-mlp", "mlp"),
        ("mamba", ["mlp_norms", "attention", "position_embeddings"], "mlp_norms, position_embeddings"),
        ("olmo", ["norms", "mlp"], "norms"),
        ("olmo", ["final_norm"], "final_norm"),
    ],
)
def test_a_part_that_the_model_lacks_is_refused(
    family: str, inherit: str | list[str], lacking: str, tmp_path: Path
) -> None:
    random_model(family).save_pretrained(tmp_path / "reference")
    with pytest.raises(SurgeryError) as caught:
        cut(tmp_path / "reference", tmp_path / "target", words=None, select="first:2", inherit=inherit)
    assert caught.value.problem == f"inherit: a {family} model of these blocks has no {lacking}"
    has = {
        "llama": "attention, attention_norms, mlp, mlp_norms, token_embeddings, final_norm, head",
        "mamba": "attention, attention_norms, token_embeddings, final_norm, head",
        "olmo": "attention, mlp, token_embeddings, head",
    }
    assert caught.value.allowed == f"inherit: all, or parts that it has: {has[family]}"
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("family", "inherit"),
    [("mamba", "attention-only"), ("mamba", ["norms", "head"]), ("mamba", "paper-scripts"), ("olmo", "mlp-only")],
)
def test_a_preset_needs_only_its_main_parts(family: str, inherit: str | list[str], tmp_path: Path) -> None:
    random_model(family).save_pretrained(tmp_path / "reference")
    report = cut(tmp_path / "reference", tmp_path / "target", words=None, select="first:2", inherit=inherit).report
    assert {tensor["inherited"] for tensor in report["tensors"]} == {True, False}


@pytest.mark.parametrize(
    ("family", "fresh"),
    [
        ("bloom", {"transformer.word_embeddings_layernorm", "transformer.ln_f"}),
        ("roformer", {"roformer.embeddings.LayerNorm", "roformer.embeddings.token_type_embeddings", TABLE}),
    ],
)
def test_the_norm_of_the_embeddings_belongs_to_them(family: str, fresh: set[str], tmp_path: Path) -> None:
    random_model(family, but=TABLE).save_pretrained(tmp_path / "reference")
    report = cut(tmp_path / "reference", tmp_path / "target", words=None, select="1,3", inherit="paper-scripts").report
    assert {t["name"].rpartition(".")[0] for t in report["tensors"] if not t["inherited"]} == fresh
    assert report["proof"]["hidden_state"] == "equal, bit for bit"
    assert report["proof"]["hidden_state_start"] == "the target's own embeddings"
    plain(tmp_path / "target")
