from typing import Any

import pytest

from inheritune_ds.config.zero import ZeroSettings, communication_bytes, read_layout, uses_bf16_optimizer

CONFIG: dict[str, Any] = {
    "bf16": {"enabled": True},
    "fp16": {"enabled": False},
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_optimization": {"stage": 1},
}


def read(**changes: Any) -> ZeroSettings:
    return read_layout({**CONFIG, **changes}, seq_len=8, world_size=2)


def test_layout_of_a_minimal_config_has_deepspeeds_defaults() -> None:
    assert read() == {
        "seq_len": 8,
        "zero_stage": 1,
        "world_size": 2,
        "precision": "bf16",
        "accumulate_fp32": True,
        "offload_optimizer": False,
        "offload_parameters": False,
        "activation_checkpointing": "none",
        "loss": "chunked",
        "masked_attention": False,
        "immediate_grad_update": False,
        "overlap_comm": False,
        "reduce_bucket_size": 500_000_000,
        "max_reuse_distance": 1_000_000_000,
        "persistence_threshold": 100_000,
        "reduce_fp32": False,
        "async_save": False,
    }


def test_layout_reads_auto_as_deepspeeds_default() -> None:
    zero = {"stage": 1, "reduce_bucket_size": "auto", "overlap_comm": "auto", "offload_optimizer": None}
    assert read(zero_optimization=zero, kernels={"loss": "auto"}) == read()


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"kernels": {"activation_checkpointing": "full"}}, "activation_checkpointing", "full"),
        ({"kernels": {"loss": "plain"}}, "loss", "plain"),
        ({"kernels": {"loss": "liger"}}, "loss", "chunked"),
        ({"kernels": {"loss": "auto"}}, "loss", "chunked"),
        ({"bf16": {"enabled": True, "immediate_grad_update": True}}, "immediate_grad_update", True),
        ({"bf16": {"enabled": False}}, "precision", "fp32"),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": True}}, "precision", "fp16"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "accumulate_fp32", False),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer", True),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_parameters", True),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}}}, "offload_parameters", False),
        ({"zero_optimization": {"stage": 3}}, "zero_stage", 3),
        ({"zero_optimization": {"stage": 3}}, "overlap_comm", True),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 7}}, "reduce_bucket_size", 7),
        ({"zero_optimization": {"stage": 3, "stage3_max_reuse_distance": 9}}, "max_reuse_distance", 9),
        ({"communication_data_type": "fp32"}, "reduce_fp32", True),
        ({"reliability": {"async_save": True}}, "async_save", True),
        ({"reliability": {"async_save": "auto"}}, "async_save", False),
    ],
)
def test_layout_reads(changes: dict[str, Any], key: str, value: object) -> None:
    assert read(**changes)[key] == value  # type: ignore[literal-required]


@pytest.mark.parametrize(
    ("attention", "masked"), [("auto", True), ("sdpa", True), ("eager", True), ("flash_attention_2", False)]
)
def test_documents_kept_apart_need_a_mask_without_flash_attention(attention: str, masked: object) -> None:
    config = {**CONFIG, "kernels": {"attention": attention}}
    assert read_layout(config, seq_len=8, world_size=2, documents=True)["masked_attention"] is masked
    assert read_layout(config, seq_len=8, world_size=2)["masked_attention"] is False


@pytest.mark.parametrize(
    ("changes", "used"),
    [
        ({}, True),
        ({"zero_optimization": {"stage": 2}}, False),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, False),
        ({"bf16": {"enabled": False}}, False),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, False),
    ],
)
def test_bf16_optimizer_is_used_for_stage_1_in_bf16_with_fp32_sums(changes: dict[str, Any], used: object) -> None:
    assert uses_bf16_optimizer(read(**changes)) is used


@pytest.mark.parametrize(
    ("changes", "size"), [({}, 2), ({"communication_data_type": "fp32"}, 4), ({"bf16": {"enabled": False}}, 4)]
)
def test_gradients_are_sent_in_the_precision_of_the_passes(changes: dict[str, Any], size: int) -> None:
    assert communication_bytes(read(**changes)) == size
