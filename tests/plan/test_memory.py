"""Budget arithmetic, held against the models and tensors that it counts."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from inheritune_ds.config.model import Shape
from inheritune_ds.config.training import Training
from inheritune_ds.config.zero import ZeroSettings
from inheritune_ds.errors import RecipeError
from inheritune_ds.plan.duration import steps_in, windows_in
from inheritune_ds.plan.memory import Memory, does_not_fit, largest_micro_batch, memory, ways_to_save
from inheritune_ds.plan.model_size import (
    GIB,
    checkpoint_bytes,
    flops_per_token,
    hardware_flops_per_token,
    parameters,
    tensors,
)
from inheritune_ds.surgery.config_cut import set_dropout
from inheritune_ds.surgery.load import build_config
from inheritune_ds.training.optimizer import parameter_groups

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
GPT2_LARGE = GPT2_MEDIUM.model_copy(update={"hidden_size": 1280, "num_hidden_layers": 36, "num_attention_heads": 20})
GPT2_XLARGE = GPT2_MEDIUM.model_copy(update={"hidden_size": 1600, "num_hidden_layers": 48, "num_attention_heads": 25})
A6000_GIB = 48.0


def layout(**changes: Any) -> ZeroSettings:
    base = ZeroSettings(
        seq_len=2048,
        zero_stage=1,
        world_size=1,
        precision="bf16",
        accumulate_fp32=True,
        offload_optimizer=False,
        offload_parameters=False,
    )
    return {**base, **changes}  # type: ignore[typeddict-item]


SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def llama(**changes: Any) -> Shape:
    return Shape(model_type="llama", **{**SMALL, "intermediate_size": 176, **changes})


def gpt2(**changes: Any) -> Shape:
    return Shape(model_type="gpt2", tie_word_embeddings=True, **{**SMALL, **changes})


def build(shape: Shape, num_blocks: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The model that transformers builds for a shape."""
    config = build_config(shape.model_copy(update={"num_hidden_layers": num_blocks}))
    set_dropout(config, 0.0)
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


def test_parameters_of_13_openllama_blocks_are_1816m() -> None:
    counted = parameters(OPENLLAMA_3B, 13)
    assert counted.embeddings == counted.head == 102_400_000
    assert counted.per_block == 123_910_400
    assert counted.total == 2 * 102_400_000 + 13 * 123_910_400 + 3200 == 1_815_638_400
    assert parameters(OPENLLAMA_3B).total == 3_426_473_600


@pytest.mark.parametrize(
    ("shape", "num_blocks", "seq_len", "billions", "gflops"),
    [
        (OPENLLAMA_3B, 26, 2048, 3.426, 21.99),
        (OPENLLAMA_3B, 13, 2048, 1.816, 11.30),
        (GPT2_MEDIUM, 24, 1024, 0.355, 2.42),
        (GPT2_MEDIUM, 16, 1024, 0.254, 1.72),
        (GPT2_LARGE, 36, 1024, 0.774, 5.20),
        (GPT2_LARGE, 18, 1024, 0.420, 2.79),
        (GPT2_XLARGE, 48, 1024, 1.557, 10.27),
        (GPT2_XLARGE, 24, 1024, 0.819, 5.38),
    ],
)
def test_parameters_and_flops_per_token_equal_the_published_counts(
    shape: Shape, num_blocks: int, seq_len: int, billions: float, gflops: float
) -> None:
    assert parameters(shape, num_blocks).total / 1e9 == pytest.approx(billions, abs=0.001)  # the table truncates
    assert flops_per_token(shape, num_blocks, seq_len) / 1e9 == pytest.approx(gflops, abs=0.011)


def predicted(micro_batch_size: int = 1, accumulation: int = 64, **changes: Any) -> Memory:
    return memory(OPENLLAMA_3B, 13, micro_batch_size=micro_batch_size, accumulation=accumulation, **layout(**changes))


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_and_tensors_equal_those_of_the_transformers_model(shape: Shape) -> None:
    model = build(shape, shape.num_hidden_layers)
    named = {name: tensor.numel() for name, tensor in model.named_parameters()}  # a tied head is one parameter

    def elements(*parts: str) -> int:
        return sum(size for name, size in named.items() if any(part in name for part in parts))

    counted = parameters(shape)
    assert counted.total == sum(named.values())
    assert counted.blocks == counted.per_block * shape.num_hidden_layers == elements(".layers.", ".h.")
    assert counted.embeddings == elements("embed", "wte", "wpe")
    assert counted.head == elements("lm_head")
    decayed, undecayed = parameter_groups(model, 0.1)
    groups = tensors(shape, shape.num_hidden_layers).groups
    assert sorted(groups[0]) == sorted(parameter.numel() for parameter in decayed["params"])
    assert sorted(groups[1]) == sorted(parameter.numel() for parameter in undecayed["params"])


def test_memory_is_that_of_the_worse_of_two_moments() -> None:
    small, large = predicted(accumulate_fp32=False), predicted(8, 8, accumulate_fp32=False)
    assert small.parts is small.update
    assert small.parts["copies"] > 0
    assert large.parts is large.backward
    assert large.total_gib == sum(large.backward.values()) > sum(large.update.values())
    assert large.tensors_gib == large.total_gib - large.parts["margin"]


def test_memory_of_more_sequences_grows_by_activations_and_their_margin() -> None:
    one, two = predicted(4, 16), predicted(8, 8)
    assert dict(one.update) == dict(two.update)
    grown = two.backward["activations"] / one.backward["activations"]
    assert grown == pytest.approx(2.0, abs=0.01)
    assert {part for part in two.backward if two.backward[part] > one.backward[part]} == {
        "activations",
        "logits and loss",
        "margin",
    }


def test_memory_without_accumulation_has_no_gradients_when_the_backward_pass_starts() -> None:
    alone, later = predicted(16, 1), predicted(16, 4)
    assert "gradients" not in alone.backward
    assert later.backward["gradients"] == pytest.approx(2 * 1_815_638_400 / GIB)


def test_memory_total_has_a_margin_of_one_gib_and_5_percent() -> None:
    for parts in (predicted().backward, predicted().update):
        rest = sum(size for part, size in parts.items() if part != "margin")
        assert parts["margin"] == pytest.approx(1.0 + 0.05 * rest)


@pytest.mark.parametrize("recomputation", ["selective", "full"])
def test_memory_falls_with_recomputation(recomputation: str) -> None:
    kept = predicted(8, 8, activation_checkpointing=recomputation).backward["activations"]
    assert kept < predicted(8, 8).backward["activations"] * {"selective": 0.7, "full": 0.25}[recomputation]


@pytest.mark.parametrize(("accumulation", "largest", "bytes_a_parameter"), [("fp32", 2, 20), ("bf16", 4, 16)])
def test_largest_micro_batch_of_the_paper_on_an_a6000_for_either_accumulation(
    accumulation: str, largest: int, bytes_a_parameter: float
) -> None:
    taken = layout(accumulate_fp32=accumulation == "fp32", reduce_bucket_size=3200 * 3200)
    assert largest_micro_batch(OPENLLAMA_3B, 13, memory_gib=A6000_GIB, batch_windows=64, **taken) == largest
    parts = memory(OPENLLAMA_3B, 13, micro_batch_size=4, accumulation=16, **taken).backward
    others = ("activations", "logits and loss", "communication buffers", "margin")
    states = sum(size for part, size in parts.items() if part not in others)
    assert states * GIB / 1_815_638_400 == pytest.approx(bytes_a_parameter)


@given(
    memory_gib=st.floats(1.6, 6.0),
    share=st.integers(1, 60),
    world_size=st.integers(1, 4),
    stage=st.sampled_from([1, 2, 3]),
)
def test_largest_micro_batch_divides_the_share_fits_and_is_the_largest(
    memory_gib: float, share: int, world_size: int, stage: int
) -> None:
    shape = gpt2(vocab_size=20_000)
    common = layout(zero_stage=stage, world_size=world_size, seq_len=1024, reduce_bucket_size=4096)
    found = largest_micro_batch(shape, 2, memory_gib=memory_gib, batch_windows=share * world_size, **common)
    fitting = [
        size
        for size in range(1, share + 1)
        if share % size == 0
        and memory(shape, 2, micro_batch_size=size, accumulation=share // size, **common).total_gib <= memory_gib
    ]
    assert found == max(fitting)


def refusal(memory_gib: float, batch_windows: int = 64, **changes: Any) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        largest_micro_batch(OPENLLAMA_3B, 13, memory_gib=memory_gib, batch_windows=batch_windows, **layout(**changes))
    return caught.value


def test_largest_micro_batch_refuses_a_model_that_does_not_fit_with_advice() -> None:
    text = str(refusal(24.0))
    assert "one sequence of 2048 tokens needs 41.6 GiB, 13.5 GiB of it Adam moments" in text
    assert "a rank has 24.0 GiB" in text
    assert "use ds_configs/zero3_offload.json" in text


@pytest.mark.parametrize(
    ("memory_gib", "changes", "advice"),
    [
        (40.5, {}, 'use bf16.immediate_grad_update true or kernels.activation_checkpointing "selective" or'),
        (14.0, {"world_size": 8}, "use ds_configs/zero2.json or ds_configs/zero3.json"),
        (
            39.0,
            {"loss": "plain", "seq_len": 4096},
            'use kernels.loss "chunked" and bf16.immediate_grad_update true and kernels.activation_checkpointing',
        ),
        (2.0, {}, "use more ranks, or a GPU with more memory"),
    ],
)
def test_the_advice_fits(memory_gib: float, changes: dict[str, Any], advice: str) -> None:
    assert advice in refusal(memory_gib, **changes).action


@pytest.mark.parametrize(
    ("sizes", "changes", "ways"),
    [
        (
            (4, 16),
            {},
            [
                "train_micro_batch_size_per_gpu 2",
                "bf16.immediate_grad_update true",
                'kernels.activation_checkpointing "selective"',
                'kernels.activation_checkpointing "full"',
                'data_types.grad_accum_dtype "bf16"',
                "ds_configs/zero3_offload.json",
            ],
        ),
        (
            (1, 1),
            {"world_size": 8, "precision": "fp32", "activation_checkpointing": "full"},
            ["ds_configs/zero2.json", "ds_configs/zero3.json", "ds_configs/zero3_offload.json"],
        ),
    ],
)
def test_ways_to_save_are_those_that_lower_the_prediction(
    sizes: tuple[int, int], changes: dict[str, Any], ways: list[str]
) -> None:
    micro_batch_size, accumulation = sizes
    given = layout(**changes)
    now = memory(OPENLLAMA_3B, 13, micro_batch_size=micro_batch_size, accumulation=accumulation, **given).total_gib
    text = ways_to_save(OPENLLAMA_3B, 13, micro_batch_size=micro_batch_size, accumulation=accumulation, **given)
    head, _, listed = text.partition("; use one or more of: ")
    assert head == f"the plan is {now:.1f} GiB"
    found = [way.removesuffix(" GiB)").split(" (") for way in listed.split(", ")]
    assert [words for words, _ in found] == ways
    assert all(float(gib) < now for _, gib in found)


def test_ways_to_save_say_when_there_is_none() -> None:
    least = layout(
        zero_stage=3, precision="fp32", offload_optimizer=True, offload_parameters=True, activation_checkpointing="full"
    )
    text = ways_to_save(OPENLLAMA_3B, 13, micro_batch_size=1, accumulation=1, **least)
    assert text.startswith("use more ranks, or a GPU with more memory; the plan is ")


def test_the_advised_smaller_micro_batch_fits() -> None:
    error = does_not_fit(OPENLLAMA_3B, 13, memory_gib=A6000_GIB, micro_batch_size=16, accumulation=4, **layout())
    assert error.problem.startswith("16 sequences of 2048 tokens need ")
    assert error.action == "set train_micro_batch_size_per_gpu to 2"


def test_largest_micro_batch_refuses_a_batch_that_ranks_cannot_share() -> None:
    with pytest.raises(RecipeError, match="64 sequences cannot be shared evenly by 3 ranks"):
        largest_micro_batch(OPENLLAMA_3B, 13, memory_gib=80.0, batch_windows=64, **layout(world_size=3))


@pytest.mark.parametrize(("recomputation", "factor"), [("none", 1.0), ("selective", 1.0), ("full", 4 / 3)])
def test_hardware_flops_include_the_repeated_forward_pass_of_the_blocks(recomputation: str, factor: float) -> None:
    tall = gpt2(num_hidden_layers=48, vocab_size=8)  # almost only blocks
    own = flops_per_token(tall, 48, 64)
    again = hardware_flops_per_token(tall, 48, 64, recomputation)  # type: ignore[arg-type]
    assert again == pytest.approx(factor * own, rel=2e-3)


def training(duration: str, batch: int = 131_072) -> Training:
    return Training.model_validate({"seq_len": 2048, "global_batch_tokens": batch, "duration": duration})


def test_steps_in_takes_whole_steps_of_each_unit() -> None:
    assert steps_in(training("100_000 steps"), None) == 100_000
    assert steps_in(training("250M tokens"), None) == 1907
    assert steps_in(training("8 epochs"), windows_in(1_000_000_000, 2048)) == 61_035
    assert steps_in(training("8 epochs"), None) is None


@given(epochs=st.integers(1, 9), unique=st.integers(200_000, 10_000_000))
def test_steps_in_is_the_most_that_fit_into_the_epochs(epochs: int, unique: int) -> None:
    windows = windows_in(unique, 2048)
    assert steps_in(training(f"{epochs} epochs"), windows) == epochs * windows * 2048 // 131_072


def test_steps_in_refuses_less_than_one_step() -> None:
    with pytest.raises(RecipeError, match=r"'1 epochs' is 98304 tokens, less than one step of 131072 tokens"):
        steps_in(training("1 epochs"), windows_in(100_000, 2048))


@pytest.mark.parametrize(
    ("num_tokens", "seq_len", "expected"),
    [(0, 4, 0), (1, 4, 0), (4, 4, 0), (5, 4, 1), (8, 4, 1), (9, 4, 2), (10, 4, 2), (13, 4, 3), (2, 1, 1)],
)
def test_windows_in_counts_windows_with_a_next_token(num_tokens: int, seq_len: int, expected: int) -> None:
    assert windows_in(num_tokens, seq_len) == expected


def test_checkpoint_bytes_of_the_paper_are_22_gb() -> None:
    assert checkpoint_bytes(1_815_638_400) == pytest.approx(21.8e9, rel=1e-3)
