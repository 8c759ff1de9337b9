import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from inheritune_ds.training.optimizer import build_optimizer, parameter_groups
from tests.launching import environment
from tests.surgery.families import tiny_config


def tiny(family: str, **values: Any) -> PreTrainedModel:
    ids = {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **ids, **values))
    return model


def gpt2() -> PreTrainedModel:
    return tiny("gpt2", n_embd=8, n_layer=2, n_head=2, n_positions=8)


def llama(**values: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    return tiny("llama", **sizes, max_position_embeddings=8, **values)


def named(block: str, *names: str) -> set[str]:
    return {f"{block}.{index}.{name}" for index in (0, 1) for name in names}


LLAMA_MATRICES = named(
    "model.layers",
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
)
LLAMA_NORMS = named("model.layers", "input_layernorm.weight", "post_attention_layernorm.weight")


@pytest.mark.parametrize("tied", [False, True])
def test_llama_decays_its_matrices_and_an_untied_head(tied: bool) -> None:  # noqa: FBT001
    decayed, undecayed = parameter_groups(llama(tie_word_embeddings=tied), 0.1)
    assert set(decayed["names"]) == LLAMA_MATRICES | (set() if tied else {"lm_head.weight"})
    assert set(undecayed["names"]) == LLAMA_NORMS | {"model.norm.weight", "model.embed_tokens.weight"}
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)


def test_gpt2_decays_its_matrices_only() -> None:
    decayed, undecayed = parameter_groups(gpt2(), 0.05)
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    rest = {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"}
    norms = ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias")
    assert set(decayed["names"]) == named("transformer.h", *(f"{name}.weight" for name in matrices))
    assert set(undecayed["names"]) == rest | named("transformer.h", *norms, *(f"{name}.bias" for name in matrices))


UNDECAYED_MATRICES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "gpt_oss": ({}, {"gate_up_proj_bias", "down_proj_bias"}),
    "cohere": ({"use_qk_norm": True}, {"q_norm.weight", "k_norm.weight"}),
    "mamba": ({}, {"A_log"}),
    "jamba": ({}, {"A_log"}),
    "zamba": ({}, {"A_log", "D", "dt_proj_bias"}),
    "rwkv": ({}, {f"time_mix_{name}" for name in ("key", "value", "receptance")}),
    "recurrent_gemma": ({}, {"input_gate_bias", "recurrent_gate_bias"}),
    "kimi_linear": ({}, {"A_log"}),
    "xlnet": ({}, {"r_w_bias", "r_r_bias", "r_s_bias", "seg_embed", "mask_emb"}),
    "deepseek_v4": ({}, {"position_bias"}),
    "dbrx": ({}, set()),
    "mixtral": ({}, set()),
    "phi3": ({}, set()),
}


@pytest.mark.parametrize("family", UNDECAYED_MATRICES)
def test_decay_follows_the_kind_of_module_and_not_the_dimensions(family: str) -> None:
    changes, expected = UNDECAYED_MATRICES[family]
    config = tiny_config(family)
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embedded = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    decayed, undecayed = parameter_groups(model, 0.1)
    several = {
        name
        for name, parameter in zip(undecayed["names"], undecayed["params"], strict=True)
        if parameter.dim() >= 2 and id(parameter) not in embedded
    }
    assert {name for name in several if not any(name.endswith(f".{end}") for end in expected)} == set()
    assert all(any(name.endswith(f".{end}") for name in several) for end in expected)
    assert all(parameter.dim() >= 2 for parameter in decayed["params"])


@pytest.mark.parametrize("make", [gpt2, llama])
def test_groups_hold_every_parameter_once_in_the_model_s_order(make: Any) -> None:
    model = make()
    groups = parameter_groups(model, 0.1)
    order = {name: number for number, (name, _) in enumerate(model.named_parameters())}
    for group in groups:
        assert [order[name] for name in group["names"]] == sorted(order[name] for name in group["names"])
        assert all(
            parameter is model.get_parameter(name)
            for name, parameter in zip(group["names"], group["params"], strict=True)
        )
    assert sorted(name for group in groups for name in group["names"]) == sorted(order)


def test_frozen_parameters_are_in_no_group() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(requires_grad=False)
    decayed, undecayed = parameter_groups(model, 0.1)
    assert (decayed["names"], undecayed["names"]) == (["1.weight"], ["1.bias"])


SETTINGS: dict[str, Any] = {"lr": 0.1, "betas": [0.8, 0.9], "eps": 1e-7}


@pytest.mark.parametrize(("kind", "fused"), [("torch_fused", True), ("torch", None)])
def test_torch_s_adamw_is_built_fused_or_plain(kind: str, fused: Any) -> None:
    optimizer = build_optimizer(kind, parameter_groups(gpt2(), 0.25), **SETTINGS)
    assert type(optimizer) is torch.optim.AdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (0.1, (0.8, 0.9), 1e-7, fused)
        assert "names" not in group


def test_a_group_without_parameters_is_skipped() -> None:
    model = nn.Linear(3, 3, bias=False)
    optimizer = build_optimizer("torch", parameter_groups(model, 0.5), **SETTINGS)
    assert optimizer is not None
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5]


def test_the_offloaded_optimizer_is_left_to_deepspeed() -> None:
    assert build_optimizer("deepspeed_cpu", parameter_groups(gpt2(), 0.5), **SETTINGS) is None


@pytest.mark.parametrize(("kind", "module"), [("apex", "apex.optimizers"), ("deepspeed", "deepspeed.ops.adam")])
def test_fused_adam_decouples_its_decay(kind: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    package, parent = ModuleType(module), ModuleType(module.rpartition(".")[0])
    package.FusedAdam = lambda groups, **settings: seen.update(settings, groups=len(groups))  # type: ignore[attr-defined]
    for name, fake in ((parent.__name__, parent), (module, package)):
        monkeypatch.setitem(sys.modules, name, fake)
    build_optimizer(kind, parameter_groups(gpt2(), 0.25), **SETTINGS)
    assert seen == {"adam_w_mode": True, "lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-7, "groups": 2}


COMPILER = """
import sys
from inheritune_ds.training.optimizer import import_muon
import_muon()
from deepspeed.runtime import compiler
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
print(compiler.compile.__module__, "torch._inductor.compile_fx" in sys.modules)
"""


def test_muon_is_imported_without_torch_s_compiler() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPILER], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "deepspeed.runtime.compiler False"
