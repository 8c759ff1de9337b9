"""Budget arithmetic, held against the models and tensors that it counts."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from inheritune_ds.budget import (
    GIB,
    Layout,
    Precision,
    checkpoint_bytes,
    flops_per_token,
    largest_micro_batch,
    memory,
    mlp_size,
    parameters,
    steps_in,
    tokens_an_epoch,
)
from inheritune_ds.errors import RecipeError
from inheritune_ds.recipe import Shape, Training

OPENLLAMA_3B = Shape(
    model_type="llama",
    vocab_size=32000,
    hidden_size=3200,
    num_hidden_layers=26,
    num_attention_heads=32,
    intermediate_size=8640,
    max_position_embeddings=2048,
)
GPT2_MEDIUM = Shape(
    model_type="gpt2",
    vocab_size=50304,
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)
A6000_GIB = 48.0


def layout(**changes: Any) -> Layout:
    base = Layout(
        seq_len=2048,
        zero_stage=1,
        world_size=1,
        precision="bf16",
        accumulate_fp32=True,
        offload_optimizer=False,
        offload_parameters=False,
    )
    return {**base, **changes}  # type: ignore[typeddict-item]


def llama(**changes: Any) -> Shape:
    small: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 176,
        "max_position_embeddings": 64,
    }
    return Shape(**{**small, **changes})


def gpt2(**changes: Any) -> Shape:
    small: dict[str, Any] = {
        "model_type": "gpt2",
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    return Shape(**{**small, **changes})


def build(shape: Shape, num_blocks: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The model that transformers builds for a shape."""
    config: GPT2Config | LlamaConfig
    common: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    if shape.model_type == "gpt2":
        config = GPT2Config(
            vocab_size=shape.vocab_size,
            n_embd=shape.hidden_size,
            n_layer=num_blocks,
            n_head=shape.num_attention_heads,
            n_positions=shape.max_position_embeddings,
            n_inner=shape.intermediate_size,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **common,
        )
    else:
        config = LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=num_blocks,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_key_value_heads,
            intermediate_size=mlp_size(shape),
            max_position_embeddings=shape.max_position_embeddings,
            tie_word_embeddings=shape.tie_word_embeddings,
            **common,
        )
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model


SHAPES = [
    llama(),
    llama(tie_word_embeddings=True),
    llama(num_key_value_heads=2),
    llama(hidden_size=48, num_attention_heads=3, num_key_value_heads=1, vocab_size=300, num_hidden_layers=5),
    gpt2(),
    gpt2(intermediate_size=100, max_position_embeddings=17, num_hidden_layers=3),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_equal_those_of_the_transformers_model(shape: Shape) -> None:
    model = build(shape, shape.num_hidden_layers)
    counted = parameters(shape)
    named = dict(model.named_parameters())  # a tied head is one parameter
    assert counted.total == sum(tensor.numel() for tensor in named.values())
    in_blocks = [tensor.numel() for name, tensor in named.items() if ".layers." in name or ".h." in name]
    assert counted.blocks == sum(in_blocks)
    assert counted.blocks == counted.per_block * shape.num_hidden_layers
    in_embeddings = [
        tensor.numel() for name, tensor in named.items() if "embed" in name or "wte" in name or "wpe" in name
    ]
    assert counted.embeddings == sum(in_embeddings)
    assert counted.head == sum(tensor.numel() for name, tensor in named.items() if "lm_head" in name)


def test_parameters_of_13_openllama_blocks_are_1816m() -> None:
    counted = parameters(OPENLLAMA_3B, 13)
    assert counted.embeddings == counted.head == 102_400_000
    assert counted.per_block == 123_910_400
    assert counted.total == 2 * 102_400_000 + 13 * 123_910_400 + 3200 == 1_815_638_400
    assert parameters(OPENLLAMA_3B).total == 3_426_473_600


@pytest.mark.parametrize(
    ("shape", "num_blocks", "seq_len", "gflops"),
    [
        (OPENLLAMA_3B, 13, 2048, 11.30),
        (OPENLLAMA_3B, 26, 2048, 21.99),
        (GPT2_MEDIUM, 24, 1024, 2.42),
        (GPT2_MEDIUM, 16, 1024, 1.72),
    ],
)
def test_flops_per_token_equal_the_published_counts(shape: Shape, num_blocks: int, seq_len: int, gflops: float) -> None:
    assert flops_per_token(shape, num_blocks, seq_len) / 1e9 == pytest.approx(gflops, abs=0.005)


def states_gib(**changes: Any) -> float:
    """All but activations, logits and margin."""
    parts = memory(OPENLLAMA_3B, 13, micro_batch_size=1, **layout(**changes)).parts
    return sum(size for part, size in parts.items() if part not in ("activations", "logits and loss", "margin"))


def test_memory_states_take_16_bytes_a_parameter_and_4_more_for_the_accumulator() -> None:
    assert states_gib(accumulate_fp32=False) == pytest.approx(27.1, abs=0.05)
    assert states_gib(accumulate_fp32=True) == pytest.approx(33.8, abs=0.05)
    assert states_gib(accumulate_fp32=False, offload_optimizer=True) == pytest.approx(6.8, abs=0.05)


@pytest.mark.parametrize(
    ("stage", "bytes_a_parameter"),
    [
        (0, 2 + 2 + 4 + 4 + 8),
        (1, 2 + 2 + 4 + (4 + 8) / 8),
        (2, 2 + (2 + 4 + 4 + 8) / 8),
    ],
)
def test_memory_shares_states_by_stage_on_eight_ranks(stage: int, bytes_a_parameter: float) -> None:
    expected = bytes_a_parameter * 1_815_638_400 / GIB
    assert states_gib(zero_stage=stage, world_size=8) == pytest.approx(expected)


def test_memory_of_stage_3_counts_the_parameters_gathered_at_once() -> None:
    parts = memory(OPENLLAMA_3B, 13, micro_batch_size=1, **layout(zero_stage=3, world_size=8)).parts
    assert parts["weights"] == pytest.approx(2 * 1_815_638_400 / 8 / GIB)
    assert parts["gathered weights"] == pytest.approx(2 * 1e9 * 7 / 8 / GIB)
    assert "gathered weights" not in memory(OPENLLAMA_3B, 13, micro_batch_size=1, **layout(zero_stage=3)).parts


def test_memory_moves_offloaded_states_to_the_host() -> None:
    offloaded = layout(zero_stage=3, offload_optimizer=True, offload_parameters=True)
    result = memory(OPENLLAMA_3B, 13, micro_batch_size=1, **offloaded)
    assert "weights" not in result.parts
    assert "Adam moments" not in result.parts
    assert result.parts["gathered weights"] == pytest.approx(2e9 / GIB)
    assert result.host_gib == pytest.approx((2 + 4 + 4 + 8) * 1_815_638_400 / GIB)
    assert memory(OPENLLAMA_3B, 13, micro_batch_size=1, **layout()).host_gib == 0.0


def test_memory_in_fp32_has_no_accumulator_but_a_master_under_zero() -> None:
    parts = memory(llama(), 2, micro_batch_size=1, **layout(precision="fp32")).parts
    assert "fp32 gradient accumulator" not in parts
    assert parts["fp32 master weights"] == parts["weights"]
    assert (
        "fp32 master weights"
        not in memory(llama(), 2, micro_batch_size=1, **layout(precision="fp32", zero_stage=0)).parts
    )


def saved_bytes(shape: Shape, num_blocks: int, dtype: torch.dtype, batch: int, seq_len: int) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, parameters left out."""
    model = build(shape, num_blocks, dtype)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in own:
            kept[pointer] = tensor
        return tensor

    tokens = torch.randint(0, shape.vocab_size, (batch, seq_len))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(input_ids=tokens, labels=tokens, use_cache=False)
    assert output.loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [llama(), llama(num_key_value_heads=2), gpt2()])
def test_memory_activations_are_the_bytes_that_transformers_saves(shape: Shape, precision: Precision) -> None:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    batch, seq_len, num_blocks = 3, 48, 4
    saved = saved_bytes(shape, num_blocks, dtype, batch, seq_len)
    parts = memory(shape, num_blocks, micro_batch_size=batch, **layout(seq_len=seq_len, precision=precision)).parts
    log_probabilities = batch * seq_len * shape.vocab_size * 4
    assert parts["activations"] * GIB + log_probabilities == pytest.approx(saved, rel=5e-3)


def test_memory_logits_are_the_peak_of_cross_entropy() -> None:
    parts = memory(OPENLLAMA_3B, 13, micro_batch_size=2, **layout()).parts
    assert parts["logits and loss"] * GIB == 2 * 2048 * 32000 * (2 + 4 + 4)
    parts = memory(OPENLLAMA_3B, 13, micro_batch_size=2, **layout(precision="fp32")).parts
    assert parts["logits and loss"] * GIB == 2 * 2048 * 32000 * (4 + 4 + 4)


def test_memory_total_is_the_sum_with_a_margin_of_one_gib_and_5_percent() -> None:
    result = memory(OPENLLAMA_3B, 13, micro_batch_size=1, **layout())
    rest = sum(size for part, size in result.parts.items() if part != "margin")
    assert result.parts["margin"] == pytest.approx(1.0 + 0.05 * rest)
    assert result.total_gib == pytest.approx(1.05 * rest + 1.0)


def test_largest_micro_batch_of_the_paper_on_an_a6000_is_2() -> None:
    assert largest_micro_batch(OPENLLAMA_3B, 13, memory_gib=A6000_GIB, batch_windows=64, **layout()) == 2


@given(
    memory_gib=st.floats(1.5, 6.0),
    share=st.integers(1, 60),
    world_size=st.integers(1, 4),
    stage=st.sampled_from([1, 2, 3]),
)
def test_largest_micro_batch_divides_the_share_fits_and_is_the_largest(
    memory_gib: float, share: int, world_size: int, stage: int
) -> None:
    shape, common = gpt2(vocab_size=20_000), layout(zero_stage=stage, world_size=world_size, seq_len=1024)
    found = largest_micro_batch(shape, 2, memory_gib=memory_gib, batch_windows=share * world_size, **common)
    fitting = [
        size
        for size in range(1, share + 1)
        if share % size == 0 and memory(shape, 2, micro_batch_size=size, **common).total_gib <= memory_gib
    ]
    assert found == max(fitting)


def test_largest_micro_batch_says_what_does_not_fit_and_what_to_do() -> None:
    with pytest.raises(RecipeError) as caught:
        largest_micro_batch(OPENLLAMA_3B, 13, memory_gib=24.0, batch_windows=64, **layout())
    text = str(caught.value)
    assert "one sequence of 2048 tokens needs 41.0 GiB, 13.5 GiB of it Adam moments" in text
    assert "a rank has 24.0 GiB" in text
    assert "ds_configs/zero3_offload.json" in text


def test_largest_micro_batch_refuses_a_batch_that_ranks_cannot_share() -> None:
    with pytest.raises(RecipeError, match="64 sequences cannot be shared evenly by 3 ranks"):
        largest_micro_batch(OPENLLAMA_3B, 13, memory_gib=80.0, batch_windows=64, **layout(world_size=3))


def training(duration: str, batch: int = 131_072) -> Training:
    return Training(seq_len=2048, global_batch_tokens=batch, duration=duration)


def test_steps_in_takes_whole_steps_of_each_unit() -> None:
    assert steps_in(training("100_000 steps"), None) == 100_000
    assert steps_in(training("250M tokens"), None) == 1907
    assert steps_in(training("8 epochs"), 1_000_000_000) == 61_035
    assert steps_in(training("8 epochs"), None) is None


@given(epochs=st.integers(1, 9), unique=st.integers(200_000, 10_000_000))
def test_steps_in_never_sees_more_than_the_epochs_asked_for(epochs: int, unique: int) -> None:
    steps = steps_in(training(f"{epochs} epochs"), unique)
    asked = epochs * tokens_an_epoch(unique, 2048)
    assert steps is not None
    assert steps * 131_072 <= asked < (steps + 1) * 131_072


def test_steps_in_refuses_less_than_one_step() -> None:
    with pytest.raises(RecipeError, match=r"'1 epochs' is 98304 tokens, less than one step of 131072 tokens"):
        steps_in(training("1 epochs"), 100_000)


def test_tokens_an_epoch_leaves_out_the_token_that_is_only_a_target() -> None:
    assert tokens_an_epoch(2049, 2048) == 2048
    assert tokens_an_epoch(2048, 2048) == 0
    assert tokens_an_epoch(0, 2048) == 0


def test_checkpoint_bytes_of_the_paper_are_25_gb() -> None:
    assert checkpoint_bytes(1_815_638_400, "bf16") == pytest.approx(25.4e9, rel=1e-3)
    assert checkpoint_bytes(100, "fp16") == 1400
    assert checkpoint_bytes(100, "fp32") == 1600
