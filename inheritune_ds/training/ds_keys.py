"""Which keys of a DeepSpeed config are passed on, owned by the recipe, or refused, and why.

The keys are those of DeepSpeed 0.19; a test compares them with the installed package.
"""

from collections.abc import Callable
from typing import Any

from inheritune_ds.recipe import Recipe

AUTO = "auto"
STAGES = (1, 2, 3)
OPTIMIZER_TYPE = "AdamW"

PASSED_ON = {
    "aio",
    "bf16",
    "comms_logger",
    "communication_data_type",
    "data_types",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "fp16",
    "gradient_predivide_factor",
    "log_level",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "timers",
    "train_micro_batch_size_per_gpu",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
}
"""Top-level keys that this file owns; DeepSpeed itself ignores a top-level key it does not know."""

REFUSED = {
    "amp": "it needs NVIDIA's apex and excludes ZeRO; use bf16",
    "torch_autocast": "precision is set by bf16 or fp16",
    "wandb": "the trainer keeps its own W&B run; see logging.wandb_project in the recipe",
    "tensorboard": "the trainer writes metrics.jsonl and W&B itself",
    "csv_monitor": "the trainer writes metrics.jsonl itself",
    "comet": "the trainer writes metrics.jsonl and W&B itself",
    "activation_checkpointing": "it works only for models written against DeepSpeed's own API",
    "autotuning": "micro-batch `auto` takes the largest that fits",
    "checkpoint": "the trainer publishes checkpoints itself; see checkpoint in the recipe",
    "compile": "torch.compile under DeepSpeed is not supported yet",
    "compression_training": "surgery is the recipe's: target.select",
    "data_efficiency": "the order of the data is the trainer's own",
    "dataloader_drop_last": "the trainer reads its token files itself",
    "datastates_ckpt": "the trainer publishes checkpoints itself",
    "expert_parallel": "models with experts are not supported",
    "gradient_allreduce_op": "gradients are averaged, so that the number of ranks does not change them",
    "hybrid_engine": "there is no generation while training",
    "managed_gradient_accumulation": "accumulation is derived from training.global_batch_tokens",
    "nebula": "the trainer publishes checkpoints itself",
    "pipeline": "pipeline parallelism is not supported",
    "sequence_parallel_size": "sequence parallelism is not supported",
    "seq_parallel_communication_data_type": "sequence parallelism is not supported",
    "sparse_gradients": "embeddings are trained densely",
    "tensor_parallel": "tensor parallelism is not supported",
    "use_data_before_expert_parallelism": "models with experts are not supported",
    "weight_quantization": "the target is trained in full precision masters",
    "elasticity": "removed from DeepSpeed",
    "curriculum_learning": "removed from DeepSpeed",
}
"""Known to DeepSpeed but in the way here; a block with `"enabled": false` is dropped with a note."""

RECIPE_OWNED: dict[str, tuple[str, Callable[[Recipe], Any]]] = {
    "train_batch_size": ("training.global_batch_tokens", lambda recipe: recipe.training.batch_windows),
    "gradient_clipping": ("optimizer.max_grad_norm", lambda recipe: recipe.optimizer.max_grad_norm),
    "optimizer.params.lr": ("optimizer.lr", lambda recipe: recipe.optimizer.lr),
    "optimizer.params.betas": ("optimizer.betas", lambda recipe: list(recipe.optimizer.betas)),
    "optimizer.params.eps": ("optimizer.eps", lambda recipe: recipe.optimizer.eps),
    "optimizer.params.weight_decay": ("optimizer.weight_decay", lambda recipe: recipe.optimizer.weight_decay),
}
BLOCK_KEYS = {
    "bf16": {"check_grad_overflow", "enabled", "immediate_grad_update"},
    "data_types": {"grad_accum_dtype"},
    "fp16": {
        "auto_cast",
        "consecutive_hysteresis",
        "enabled",
        "hysteresis",
        "initial_scale_power",
        "loss_scale",
        "loss_scale_window",
        "min_loss_scale",
    },
}
"""Keys inside these blocks; DeepSpeed's other ones keep masters or buffers in half precision."""

DERIVED = {"gradient_accumulation_steps": "training.global_batch_tokens / (micro-batch x seq_len x ranks)"}

SWITCH = "true or false"
COUNT = "a count of elements, or auto"
OFFLOAD = '{"device": "cpu"}, with device none, cpu or nvme, or null'

ZERO_KEYS = {
    "stage": "1, 2 or 3",
    "contiguous_gradients": SWITCH,
    "reduce_scatter": SWITCH,
    "reduce_bucket_size": COUNT,
    "use_multi_rank_bucket_allreduce": SWITCH,
    "allgather_partitions": SWITCH,
    "allgather_bucket_size": COUNT,
    "overlap_comm": SWITCH,
    "offload_param": OFFLOAD,
    "offload_optimizer": OFFLOAD,
    "sub_group_size": COUNT,
    "stage3_prefetch_bucket_size": COUNT,
    "stage3_param_persistence_threshold": COUNT,
    "stage3_model_persistence_threshold": COUNT,
    "stage3_max_live_parameters": COUNT,
    "stage3_max_reuse_distance": COUNT,
    "stage3_gather_16bit_weights_on_model_save": SWITCH,
    "stage3_use_all_reduce_for_fetch_params": SWITCH,
    "round_robin_gradients": SWITCH,
    "ignore_unused_parameters": SWITCH,
    "memory_efficient_linear": SWITCH,
}


def accepts(kind: str, value: Any) -> bool:
    """Whether a value is of a kind that ZERO_KEYS names; DeepSpeed would stop with a traceback."""
    if kind == SWITCH:
        return isinstance(value, bool)
    if kind == OFFLOAD:
        return value is None or (isinstance(value, dict) and value.get("device", "none") in ("none", "cpu", "nvme"))
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())  # 5e8 is a float in JSON
    return whole and not isinstance(value, bool) and value >= 0
