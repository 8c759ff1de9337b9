from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from inheritune_ds.errors import SurgeryError
from inheritune_ds.surgery.config_cut import num_blocks
from inheritune_ds.surgery.load import load_model
from inheritune_ds.surgery.meta_model import MetaModel, check_same_blocks, contradiction, mapped_tensors
from tests.surgery import tiny
from tests.surgery.families import tiny_config


def config(family: str, **changes: Any) -> PreTrainedConfig:
    values = {**tiny.IDS, **tiny.FAMILIES.get(family, tiny.WIDE), "tie_word_embeddings": False, **changes}
    made: PreTrainedConfig = AutoConfig.for_model(family, **values)
    return made


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("t5", {}, "it is of an encoder-decoder family"),
        ("bart", {}, "it is of an encoder-decoder family"),
        ("musicgen", {}, "it is of an encoder-decoder family"),
        ("musicgen_melody", {}, "it is of an encoder-decoder family"),
        ("gemma3", {}, "it is made of several models (text_config, vision_config)"),
        ("vit", {}, "transformers has no causal language model for it"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "its weights are quantized"),
        (
            "gemma3n_text",
            {"num_kv_shared_layers": 2},
            "blocks share keys and values across layers (num_kv_shared_layers is 2)",
        ),
    ],
)
def test_models_other_than_decoders_are_refused(family: str, changes: dict[str, Any], reason: str) -> None:
    asked = AutoConfig.for_model(family, **changes)
    with pytest.raises(SurgeryError) as caught:
        MetaModel(asked)
    assert caught.value.problem.startswith(f"a {family} model cannot be cut: {reason}")
    assert caught.value.allowed == "a decoder-only causal language model of the installed transformers"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_decoder_is_accepted(family: str) -> None:
    skeleton = MetaModel(config(family, tie_word_embeddings=family in tiny.TIED), torch.bfloat16)
    model = tiny.make_model(family)
    assert skeleton.blocks.path == tiny.PATHS[family]
    assert skeleton.shapes == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert all(parameter.device.type == "meta" for parameter in skeleton.model.parameters())
    assert {parameter.dtype for parameter in skeleton.model.parameters()} == {torch.bfloat16}
    assert skeleton.required == dict(model.named_parameters()).keys()


def test_an_invalid_config_value_is_refused() -> None:
    with pytest.raises(SurgeryError) as caught:
        MetaModel(config("llama", hidden_act="no-such-function"))
    assert caught.value.problem == ("no causal language model can be built from this llama config: 'no-such-function'")


@pytest.mark.parametrize("depth", [None, 0, -1, True, "two"])
def test_a_config_without_a_number_of_blocks_is_refused(depth: Any) -> None:
    asked = config("llama")
    object.__setattr__(asked, "num_hidden_layers", depth)
    with pytest.raises(SurgeryError) as caught:
        num_blocks(asked)
    assert caught.value.problem == f"a llama config has no number of blocks (num_hidden_layers is {depth!r})"


def test_module_names_follow_the_loader() -> None:
    skeleton = MetaModel(config("gpt2", tie_word_embeddings=True))
    assert skeleton.module_names(["h.3.mlp.c_fc.weight", "transformer.ln_f.bias", "odd"]) == {
        "h.3.mlp.c_fc.weight": "transformer.h.3.mlp.c_fc.weight",
        "transformer.ln_f.bias": "transformer.ln_f.bias",
        "odd": "odd",
    }


@pytest.mark.parametrize(
    ("name", "ignored"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", True),
        ("transformer.h.0.attn.masked_bias", True),
        ("transformer.h.0.attn.attention.bias", True),
        ("transformer.h.0.attn.attention.masked_bias", True),
        ("transformer.h.0.attn.causal_mask", True),
        ("transformer.h.0.attn.attention.q_proj.bias", False),
        ("position_ids", True),
        ("model.layers.0.self_attn.q_proj.weight", False),
        ("my_position_ids", False),
    ],
)
def test_leftovers_of_older_versions_are_ignored(name: str, *, ignored: bool) -> None:
    assert MetaModel(config("llama")).is_ignored(name) is ignored


def test_load_names_unfitting_tensors() -> None:
    skeleton = MetaModel(config("llama"))
    weight, unknown = torch.empty(17, device="meta"), torch.empty(16, device="meta")
    with pytest.raises(SurgeryError) as caught:
        skeleton.load({"model.norm.weight": weight, "model.norm.wait": unknown})
    assert caught.value.problem.split("\n    ")[1:] == [
        "model.norm.wait has no place in the model",
        "model.norm.weight has shape [17], the config asks for [16]",
    ]


def test_contradiction_shows_five_and_counts_the_others() -> None:
    lines = contradiction([f"tensor {number}" for number in range(9)]).problem.split("\n")
    assert lines[1:] == [*(f"    tensor {number}" for number in range(5)), "    and 4 more"]
    assert "more" not in contradiction(["tensor"] * 5).problem


def refused(reference: MetaModel, block: int, target: MetaModel, place: int) -> str:
    """The difference between a block and the target's block, from the error."""
    with pytest.raises(SurgeryError) as caught:
        check_same_blocks(reference, block, target, place)
    kind = reference.config.model_type
    beginning = f"{kind}: block {block} of the reference would not compute the same as block {place} of the target: "
    assert caught.value.problem.startswith(beginning)
    assert caught.value.problem.endswith("and the config cannot express the selection")
    assert caught.value.allowed.startswith("a selection that keeps every block at its index (first:n)")
    return caught.value.problem.removeprefix(beginning).partition(". Its computation")[0]


def test_equal_blocks_may_have_any_index() -> None:
    llama = MetaModel(config("llama"))
    check_same_blocks(llama, 3, MetaModel(config("llama", attention_dropout=0.5)), 0)
    gpt2 = MetaModel(config("gpt2"))
    check_same_blocks(gpt2, 2, MetaModel(config("gpt2", attn_pdrop=0.3, resid_pdrop=0.0)), 2)


def test_blocks_with_other_settings_are_refused() -> None:
    ours = MetaModel(config("llama"))
    wide = MetaModel(config("llama", intermediate_size=32))
    assert refused(ours, 1, wide, 0).startswith("mlp.intermediate_size is 24 there and 32 here")
    exact = MetaModel(config("llama", rms_norm_eps=1e-3))
    assert refused(ours, 0, exact, 0) == "input_layernorm.variance_epsilon is 1e-06 there and 0.001 here"
    biased = MetaModel(config("llama", attention_bias=True))
    assert refused(ours, 0, biased, 0) == "self_attn.q_proj.bias is None there and [16] here"


def test_a_number_that_is_not_the_block_s_own_may_not_differ() -> None:
    ours, other = MetaModel(config("llama")), MetaModel(config("llama"))
    other.block(2).self_attn.layer_idx = 1  # type: ignore[union-attr]
    assert refused(ours, 0, other, 2) == "self_attn.layer_idx is 0 there and 1 here"


def test_blocks_of_other_modules_are_refused() -> None:
    ours = MetaModel(config("llama"))
    other = MetaModel(config("llama"))
    other.block(1).mlp = torch.nn.Identity()
    assert refused(ours, 1, other, 1) == "mlp is a LlamaMLP there and a Identity here"
    del other.block(1).mlp
    assert refused(ours, 1, other, 1) == "mlp is a LlamaMLP there and a nothing here"


def test_different_attention_windows_are_detected() -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    reference = MetaModel(config("qwen2", layer_types=types))
    target = MetaModel(config("qwen2", num_hidden_layers=2, layer_types=[types[0], types[0]], max_window_layers=0))
    check_same_blocks(reference, 2, target, 1)
    difference = refused(reference, 1, target, 1)
    assert "full_attention" in difference or "sliding_window" in difference


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory is that of a file."""
    ranges = (line.split() for line in Path("/proc/self/maps").read_text().splitlines() if ".safetensors" in line)
    bounds = [[int(end, 16) for end in words[0].split("-")] for words in ranges]
    return any(start <= tensor.data_ptr() < end for start, end in bounds)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_mapped_from_the_files_in_the_order_of_the_model(
    dtype: torch.dtype, family: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(family, 2), dtype=dtype).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="float32")
    own, names = dict(model.named_parameters(remove_duplicate=False)), []
    for name, tensor in mapped_tensors(tmp_path):
        names.append(name)
        assert torch.equal(tensor.float(), own[name])
        assert tensor.dtype == dtype
        assert is_mapped(tensor) == ("experts" not in name), "fused ones are several tensors of the file"
    assert {*names} == own.keys()
    assert [name for name in names if name not in model.all_tied_weights_keys] == list(dict(model.named_parameters()))


def test_tensors_of_files_with_several_types_are_exact_in_fp32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", 2), dtype=torch.bfloat16)
    model.model.norm.to(torch.float32)
    with torch.no_grad():
        model.model.norm.weight.add_(1e-5)  # lost in bf16
    model.save_pretrained(tmp_path)
    own = model.state_dict()
    found = dict(mapped_tensors(tmp_path))
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert all(torch.equal(tensor, own[name].float()) for name, tensor in found.items())
    assert not torch.equal(found["model.norm.weight"], torch.ones_like(found["model.norm.weight"]))
