"""Which tensors each preset leaves fresh, written out by hand.

`paper-scripts` is what the published scripts leave at their initial values (LLM-Inheritune, commit 560611d:
lit-gpt/Training/train.py, GPT2-experiments/train_iniheritune.py): of LLaMA the token embeddings and the final norm,
of GPT-2, whose head is tied, the position embeddings and the final norm. The ablations are those of the paper's
table 3: attention with its norm, MLP with its norm, both without norms.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from inheritune_ds.errors import SurgeryError
from inheritune_ds.surgery.inherit import TargetModel
from tests.surgery.families import tiny_config
from tests.surgery.tiny import cut, plain

LLAMA: dict[str, list[str]] = {
    "all": [],
    "paper-scripts": ["model.embed_tokens.weight", "model.norm.weight"],
    "attention-only": [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ],
    "mlp-only": [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.self_attn.v_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
    ],
    "attention-mlp": [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
    ],
}
GPT2: dict[str, list[str]] = {
    "all": [],
    "paper-scripts": ["transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"],
    "attention-only": [
        "transformer.wpe.weight",
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
        "transformer.h.0.ln_2.weight",
        "transformer.h.0.ln_2.bias",
        "transformer.h.0.mlp.c_fc.weight",
        "transformer.h.0.mlp.c_fc.bias",
        "transformer.h.0.mlp.c_proj.weight",
        "transformer.h.0.mlp.c_proj.bias",
        "transformer.h.1.ln_2.weight",
        "transformer.h.1.ln_2.bias",
        "transformer.h.1.mlp.c_fc.weight",
        "transformer.h.1.mlp.c_fc.bias",
        "transformer.h.1.mlp.c_proj.weight",
        "transformer.h.1.mlp.c_proj.bias",
    ],
    "mlp-only": [
        "transformer.wpe.weight",
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
        "transformer.h.0.ln_1.weight",
        "transformer.h.0.ln_1.bias",
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_attn.bias",
        "transformer.h.0.attn.c_proj.weight",
        "transformer.h.0.attn.c_proj.bias",
        "transformer.h.1.ln_1.weight",
        "transformer.h.1.ln_1.bias",
        "transformer.h.1.attn.c_attn.weight",
        "transformer.h.1.attn.c_attn.bias",
        "transformer.h.1.attn.c_proj.weight",
        "transformer.h.1.attn.c_proj.bias",
    ],
    "attention-mlp": [
        "transformer.wpe.weight",
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
        "transformer.h.0.ln_1.weight",
        "transformer.h.0.ln_1.bias",
        "transformer.h.0.ln_2.weight",
        "transformer.h.0.ln_2.bias",
        "transformer.h.1.ln_1.weight",
        "transformer.h.1.ln_1.bias",
        "transformer.h.1.ln_2.weight",
        "transformer.h.1.ln_2.bias",
    ],
}
CASES = [("llama", preset, fresh) for preset, fresh in LLAMA.items()]
CASES += [("gpt2", preset, fresh) for preset, fresh in GPT2.items()]
START = {
    ("llama", "paper-scripts"): "the target's own embeddings",
    ("gpt2", "paper-scripts"): "the target's own embeddings",  # its position embeddings are fresh
    ("llama", "all"): "the reference's embeddings",
    ("gpt2", "all"): "the reference's embeddings",
}


TABLE = "roformer.encoder.embed_positions"


def save_random(family: str, folder: Path) -> None:
    """Save a tiny model of any family in which no tensor keeps its initial value, but a table of sines its own."""
    model = AutoModelForCausalLM.from_config(tiny_config(family))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(TABLE):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(folder)


@pytest.mark.parametrize(("family", "preset", "fresh"), CASES, ids=[f"{case[0]} {case[1]}" for case in CASES])
def test_preset_leaves_fresh_what_the_published_scripts_do(
    family: str,
    preset: str,
    fresh: list[str],
    reference_folder: Callable[..., Path],
    build: Callable[..., TargetModel],
) -> None:
    folder = reference_folder(family)
    built = build(folder, select="first:2", inherit=preset, seed=7)
    report = built.report
    assert {tensor["name"] for tensor in report["tensors"] if not tensor["inherited"]} == set(fresh)
    assert {tensor["name"] for tensor in report["tensors"] if tensor["source"] is None} == set(fresh)
    reference, target = load_file(folder / "model.safetensors"), load_file(built.folder / "model.safetensors")
    random = load_file(
        build(folder, to="random", select="first:2", inherit="none", seed=7).folder / "model.safetensors"
    )
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
    family: str,
    parts: list[str],
    inherited: set[str],
    reference_folder: Callable[..., Path],
    build: Callable[..., TargetModel],
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
def test_a_part_that_the_model_does_not_have_is_refused(
    family: str, inherit: str | list[str], lacking: str, tmp_path: Path
) -> None:
    save_random(family, tmp_path / "reference")
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
def test_a_preset_takes_what_there_is_of_what_it_is_not_about(
    family: str, inherit: str | list[str], tmp_path: Path
) -> None:
    save_random(family, tmp_path / "reference")
    report = cut(tmp_path / "reference", tmp_path / "target", words=None, select="first:2", inherit=inherit).report
    assert {tensor["inherited"] for tensor in report["tensors"]} == {True, False}


@pytest.mark.parametrize(
    ("family", "fresh"),
    [
        ("bloom", {"transformer.word_embeddings_layernorm", "transformer.ln_f"}),
        ("roformer", {"roformer.embeddings.LayerNorm", "roformer.embeddings.token_type_embeddings", TABLE}),
    ],
)
def test_the_norm_of_the_embeddings_is_theirs(family: str, fresh: set[str], tmp_path: Path) -> None:
    save_random(family, tmp_path / "reference")
    report = cut(tmp_path / "reference", tmp_path / "target", words=None, select="1,3", inherit="paper-scripts").report
    assert {t["name"].rpartition(".")[0] for t in report["tensors"] if not t["inherited"]} == fresh
    assert report["proof"]["hidden_state"] == "equal, bit for bit"
    assert report["proof"]["hidden_state_start"] == "the target's own embeddings"
    plain(tmp_path / "target")
