"""The keys of DeepSpeed that do not work here: why, which of their values change nothing, and what to write instead.

The keys are those of DeepSpeed 0.19; a test compares them with the installed package.
"""

from collections.abc import Mapping
from typing import Any

from inheritune_ds.config.fields import AUTO

_ZERO_PLUS_PLUS = "ZeRO++ is not supported"
_HALF = "masters and gradients are kept in fp32"
REFUSED = {
    "activation_checkpointing": "it works only for models written against DeepSpeed's own API; "
    "see kernels.activation_checkpointing",
    "amp": "it needs NVIDIA's apex and excludes ZeRO; use bf16",
    "autotuning": "micro-batch `auto` takes the largest that fits",
    "bf16.bf16_master_weights_and_grads": _HALF,
    "bf16.bf16_optimizer_states": "moments are kept in fp32",
    "checkpoint": "the trainer publishes checkpoints itself; see checkpoint in the recipe",
    "comet": "the trainer writes metrics.jsonl and W&B itself",
    "compile": "blocks are compiled before DeepSpeed sees them; see kernels.compile",
    "compression_training": "surgery is the recipe's: target.select",
    "csv_monitor": "the trainer writes metrics.jsonl itself",
    "curriculum_learning": "removed from DeepSpeed",
    "data_efficiency": "the trainer orders the data itself",
    "data_types.buffer_dtype": "buffers are kept as they were loaded",
    "data_types.keep_in_fp32_modules": "buffers are kept as they were loaded",
    "data_types.param_dtype": "precision is set by bf16 or fp16",
    "dataloader_drop_last": "the trainer reads its token files itself",
    "datastates_ckpt": "the trainer publishes checkpoints itself",
    "eigenvalue": "removed from DeepSpeed",
    "elasticity": "removed from DeepSpeed",
    "expert_parallel": "models with experts are not supported",
    "fp16.fp16_master_weights_and_grads": _HALF,
    "gradient_allreduce_op": "gradients are averaged, so that the number of ranks does not change them",
    "graph_harvesting": "removed from DeepSpeed",
    "hybrid_engine": "there is no generation while training",
    "managed_gradient_accumulation": "accumulation is derived from training.global_batch_tokens",
    "nebula": "the trainer publishes checkpoints itself",
    "optimizer.legacy_fusion": "fused optimizers are selected by kernels.optimizer",
    "optimizer.params.amsgrad": "the optimizer is AdamW",
    "optimizer.params.bias_correction": "the optimizer is AdamW",
    "optimizer.params.fp32_optimizer_states": "moments are kept in fp32",
    "optimizer.params.max_grad_norm": "gradients are clipped by optimizer.max_grad_norm of the recipe",
    "pipeline": "pipeline parallelism is not supported",
    "progressive_layer_drop": "removed from DeepSpeed",
    "quantize_training": "removed from DeepSpeed",
    "seq_parallel_communication_data_type": "sequence parallelism is not supported",
    "sequence_parallel_size": "sequence parallelism is not supported",
    "sparse_attention": "removed from DeepSpeed",
    "sparse_gradients": "embeddings are trained densely",
    "tensor_parallel": "tensor parallelism is not supported",
    "tensorboard": "the trainer writes metrics.jsonl and W&B itself",
    "torch_autocast": "precision is set by bf16 or fp16",
    "use_data_before_expert_parallelism": "models with experts are not supported",
    "wandb": "the trainer keeps its own W&B run; see logging.wandb_project in the recipe",
    "weight_quantization": "the target is trained in full precision masters",
    "zero_optimization.allgather_sequential": "not tried here",
    "zero_optimization.compute_grad_norm": "the gradient norm is a metric",
    "zero_optimization.cpu_offload": "an old name in DeepSpeed; it is offload_optimizer now",
    "zero_optimization.cpu_offload_param": "an old name in DeepSpeed; it is offload_param now",
    "zero_optimization.cpu_offload_use_pin_memory": "DeepSpeed ignores it; it is pin_memory of the offload blocks now",
    "zero_optimization.elastic_checkpoint": "the trainer's checkpoints resume on any number of ranks",
    "zero_optimization.enable_sanity_checks": "for DeepSpeed's developers",
    "zero_optimization.leaf_module": "models with experts are not supported",
    "zero_optimization.legacy_stage1": "another implementation of stage 1, not tested here",
    "zero_optimization.load_from_fp32_weights": "masters are loaded as they were saved",
    "zero_optimization.log_trace_cache_warnings": "for DeepSpeed's developers",
    "zero_optimization.mics_hierarchical_params_gather": "removed from DeepSpeed",
    "zero_optimization.mics_shard_size": "removed from DeepSpeed",
    "zero_optimization.module_granularity_threshold": "not tried here",
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "for superchips; not tried here",
    "zero_optimization.offload_optimizer.super_offload": "for superchips; not tried here",
    "zero_optimization.override_module_apply": "for DeepSpeed's own model construction",
    "zero_optimization.parameter_alignment": "not tried here",
    "zero_optimization.pipeline_loading_checkpoint": "pipeline parallelism is not supported",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "the optimizer is AdamW",
    "zero_optimization.stage3_allgather_sequential": "not tried here",
    "zero_optimization.stage3_module_granularity_threshold": "not tried here",
    "zero_optimization.zenflow": "it changes which update a gradient is part of",
    "zero_optimization.zero_hpz_partition_size": _ZERO_PLUS_PLUS,
    "zero_optimization.zero_quantized_gradients": _ZERO_PLUS_PLUS,
    "zero_optimization.zero_quantized_nontrainable_weights": _ZERO_PLUS_PLUS,
    "zero_optimization.zero_quantized_weights": _ZERO_PLUS_PLUS,
    "zero_optimization.zeropp_loco_param": _ZERO_PLUS_PLUS,
}
"""The reason by key path; a value that changes nothing is dropped with a note."""

UNREAD = ("comms_config", "monitor_config")
"""Top-level keys of published configs that DeepSpeed does not read; they are dropped with a note."""

INSTEAD = {
    "activation_checkpointing": 'replace it by "kernels": {"activation_checkpointing": "full"}',
    "amp": 'replace it by "bf16": {"enabled": true}',
    "autotuning": 'replace it by "train_micro_batch_size_per_gpu": "auto"',
    "compile": 'replace it by "kernels": {"compile": true}',
    "torch_autocast": 'replace it by "bf16": {"enabled": true} ("fp16" for dtype float16)',
    "zero_optimization.cpu_offload": 'replace it by "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'replace it by "offload_param": {"device": "cpu"}',
}
"""What has the effect of a refused key; the others have no equivalent and are removed."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "checkpoint.tag_validation": ("Ignore", "Warn", "Fail"),
    "gradient_allreduce_op": ("mean",),
    "managed_gradient_accumulation": (True,),
    "optimizer.params.bias_correction": (True,),
    "optimizer.params.fp32_optimizer_states": (True,),
    "optimizer.params.max_grad_norm": (0,),
    "seq_parallel_communication_data_type": ("fp32",),
    "sequence_parallel_size": (1,),
    "zero_optimization.compute_grad_norm": (True,),
    "zero_optimization.cpu_offload_use_pin_memory": (True, False),
    "zero_optimization.load_from_fp32_weights": (True, False),
    "zero_optimization.mics_shard_size": (-1,),
    "zero_optimization.module_granularity_threshold": (0,),
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": (0.8,),
    "zero_optimization.override_module_apply": (True,),
    "zero_optimization.stage3_module_granularity_threshold": (0,),
    "zero_optimization.zero_hpz_partition_size": (0, 1),
}
"""Values that change nothing, of keys for which `false` is not the only one."""

_SWITCHES: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "compile": ("deepcompile", (False,)),
    "expert_parallel": ("autoep_size", (0, 1)),
    "tensor_parallel": ("autotp_size", (0, 1)),
}
"""The key that turns a block on, and its values that leave it off; otherwise `enabled` and false."""


def changes_nothing(path: str, value: Any) -> bool:
    """Whether a value of a refused key has no effect: DeepSpeed's default, off, null or `auto`."""
    if value in (AUTO, None):
        return True
    if path in _NEUTRAL:
        return _is_one_of(value, _NEUTRAL[path])
    if not isinstance(value, dict):
        return value is False
    switch, off = _SWITCHES.get(path, ("enabled", (False,)))
    if switch in value:
        return value[switch] in (AUTO, None) or _is_one_of(value[switch], off)
    return all(changes_nothing(f"{path}.{key}", item) for key, item in value.items())


def _is_one_of(value: Any, known: tuple[Any, ...]) -> bool:
    """Whether a value is listed; true is not 1."""
    return any(isinstance(value, bool) == isinstance(item, bool) and value == item for item in known)
