"""Which keys of a DeepSpeed config are passed on, owned by the recipe, or refused, and why.

The keys are those of DeepSpeed 0.19; a test compares them with the installed package.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from inheritune_ds.config.kernels import ACTIVATION_CHECKPOINTING, ATTENTIONS, LOSSES, OPTIMIZERS
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.config.reliability import SAVE_ERROR_POLICIES, WATCHDOG_S

AUTO = "auto"
STAGES = (1, 2, 3)
OPTIMIZER_TYPE = "AdamW"


@dataclass(frozen=True)
class ValueRule:
    """What may stand behind a key; DeepSpeed would stop with a traceback at anything else, or ignore it.

    Attributes:
        allowed: In words.
        accepts: Whether a value of the JSON document is of this kind.
        why: A value that DeepSpeed has and this program has not, and the reason; `(None, "")` if there is none.
    """

    allowed: str
    accepts: Callable[[Any], bool]
    why: tuple[Any, str] = (None, "")

    def reason(self, value: Any) -> str:
        """What a refusal of a value adds, in brackets."""
        refused, text = self.why
        return f" ({text})" if text and type(value) is type(refused) and value == refused else ""


Kinds: TypeAlias = Mapping[str, "ValueRule | Kinds"]
"""The keys of an object; a key is a value of some kind or an object again."""


def _whole(value: Any) -> bool:
    """Whether a value is a whole number; 5e8 is a float in JSON."""
    return not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, float) and value.is_integer()))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def one_of(*values: Any, why: tuple[Any, str] = (None, "")) -> ValueRule:
    """One of a few values, of exactly the same type (JSON's 1 is not true)."""
    return ValueRule(
        " or ".join(filter(None, (", ".join(map(str, values[:-1])), str(values[-1])))),
        lambda given: any(type(given) is type(value) and given == value for value in values),
        why,
    )


SWITCH = ValueRule("true or false", lambda value: isinstance(value, bool))
ALWAYS = ValueRule("true", lambda value: value is True)
COUNT = ValueRule("a whole number, 0 or more", lambda value: _whole(value) and value >= 0)
POSITIVE = ValueRule("a whole number, 1 or more", lambda value: _whole(value) and value >= 1)
DEPTH = ValueRule("a whole number, -1 or more", lambda value: _whole(value) and value >= -1)
NUMBER = ValueRule("a number, 0 or more", lambda value: _number(value) and value >= 0)
FACTOR = ValueRule("a number above 0", lambda value: _number(value) and value > 0)
# faulthandler's clock counts nanoseconds in 63 bits: it takes 9.2e9 s.
LIMIT_S = ValueRule(
    'seconds above 0, at most 1e9 ("watchdog": false for none)', lambda value: _number(value) and 0 < value <= 1e9
)
NAMES = ValueRule(
    'a list of names, such as ["all_reduce"]',
    lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
)
PATH = ValueRule("a path, or null", lambda value: value is None or (isinstance(value, str) and value != ""))
ANY = ValueRule('"auto"', lambda _: True)
"""A key with an owner of its own, who says what is wrong with a value."""

OFFLOAD_DEVICE = one_of(
    "none", "cpu", why=("nvme", "DeepSpeed does not bring a state on NVMe back as it was: a resumed run would differ")
)
ZERO_KEYS: Kinds = {
    "stage": one_of(*STAGES, why=(0, "stage 0 loses precision in bf16 and has no gradient norm")),
    "contiguous_gradients": SWITCH,
    "reduce_scatter": SWITCH,
    "reduce_bucket_size": POSITIVE,
    "use_multi_rank_bucket_allreduce": SWITCH,
    "allgather_partitions": SWITCH,
    "allgather_bucket_size": COUNT,
    "overlap_comm": SWITCH,
    "offload_param": {
        "device": OFFLOAD_DEVICE,
        "nvme_path": PATH,
        "pin_memory": SWITCH,
        "buffer_count": COUNT,
        "buffer_size": COUNT,
        "max_in_cpu": COUNT,
    },
    "offload_optimizer": {
        "device": OFFLOAD_DEVICE,
        "nvme_path": PATH,
        "pin_memory": SWITCH,
        "buffer_count": COUNT,
        "pipeline_read": SWITCH,
        "pipeline_write": SWITCH,
        "fast_init": SWITCH,
        "ratio": ValueRule(
            "1; with less DeepSpeed does not save the moments that stay on the GPU",
            lambda value: _number(value) and value == 1,
        ),
    },
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

PASSED_ON: Kinds = {
    "aio": {
        "block_size": POSITIVE,
        "queue_depth": POSITIVE,
        "intra_op_parallelism": POSITIVE,
        "single_submit": SWITCH,
        "overlap_events": SWITCH,
        "use_gds": SWITCH,
    },
    "bf16": {"enabled": SWITCH, "check_grad_overflow": SWITCH, "immediate_grad_update": SWITCH},
    "comms_logger": {
        "enabled": SWITCH,
        "verbose": SWITCH,
        "prof_all": SWITCH,
        "debug": SWITCH,
        "prof_ops": NAMES,
    },
    "communication_data_type": one_of("fp32", "bf16", "fp16"),
    "data_types": {"grad_accum_dtype": one_of("fp32", "bf16", "fp16")},
    "disable_allgather": SWITCH,
    "disable_python_gc": SWITCH,
    "dump_state": SWITCH,
    "flops_profiler": {
        "enabled": SWITCH,
        "recompute_fwd_factor": NUMBER,
        "profile_step": POSITIVE,
        "module_depth": DEPTH,
        "top_modules": POSITIVE,
        "detailed": SWITCH,
        "output_file": PATH,
    },
    "fp16": {
        "enabled": SWITCH,
        "auto_cast": SWITCH,
        "loss_scale": NUMBER,
        "initial_scale_power": COUNT,
        "loss_scale_window": POSITIVE,
        "hysteresis": POSITIVE,
        "consecutive_hysteresis": SWITCH,
        "min_loss_scale": POSITIVE,
    },
    "gradient_predivide_factor": FACTOR,
    "log_level": one_of("debug", "info", "warning", "error", "critical"),
    "memory_breakdown": SWITCH,
    "prescale_gradients": SWITCH,
    "steps_per_print": POSITIVE,
    "timers": {"throughput": {"enabled": SWITCH, "synchronized": SWITCH}},
    "train_micro_batch_size_per_gpu": ValueRule("1, 2, 3, ...", lambda value: type(value) is int and value >= 1),
    "wall_clock_breakdown": SWITCH,
    "zero_allow_untested_optimizer": SWITCH,
    "zero_force_ds_cpu_optimizer": SWITCH,
    "zero_optimization": ZERO_KEYS,
}
"""Keys that this file owns; DeepSpeed itself ignores a top-level key it does not know. Its other keys inside
bf16, fp16 and data_types keep masters or buffers in half precision."""

KERNEL_KEYS: Kinds = {
    "attention": one_of(*ATTENTIONS),
    "optimizer": one_of(*OPTIMIZERS),
    "liger": SWITCH,
    "loss": one_of(*LOSSES),
    "compile": SWITCH,
    "activation_checkpointing": one_of(*ACTIVATION_CHECKPOINTING),
}

RELIABILITY_KEYS: Kinds = {
    "async_save": SWITCH,
    "on_save_error": one_of(*SAVE_ERROR_POLICIES),
    "watchdog": SWITCH,
    "watchdog_s": dict.fromkeys(WATCHDOG_S, LIMIT_S),
}

OURS: Kinds = {"kernels": KERNEL_KEYS, "reliability": RELIABILITY_KEYS}
"""Blocks of this program; DeepSpeed's tools read past them."""

REFUSED = {
    "amp": "it needs NVIDIA's apex and excludes ZeRO; use bf16",
    "torch_autocast": "precision is set by bf16 or fp16",
    "wandb": "the trainer keeps its own W&B run; see logging.wandb_project in the recipe",
    "tensorboard": "the trainer writes metrics.jsonl and W&B itself",
    "csv_monitor": "the trainer writes metrics.jsonl itself",
    "comet": "the trainer writes metrics.jsonl and W&B itself",
    "activation_checkpointing": "it works only for models written against DeepSpeed's own API; "
    "see kernels.activation_checkpointing",
    "autotuning": "micro-batch `auto` takes the largest that fits",
    "checkpoint": "the trainer publishes checkpoints itself; see checkpoint in the recipe",
    "compile": "blocks are compiled before DeepSpeed sees them; see kernels.compile",
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

DERIVED = {"gradient_accumulation_steps": "training.global_batch_tokens / (micro-batch x seq_len x ranks)"}

OWNED_ELSEWHERE: Kinds = {
    "train_batch_size": ANY,
    "gradient_clipping": ANY,
    "gradient_accumulation_steps": ANY,
    "optimizer": {
        "type": one_of(OPTIMIZER_TYPE),
        "params": {
            "lr": ANY,
            "betas": ANY,
            "eps": ANY,
            "weight_decay": ANY,
            "torch_adam": ALWAYS,
            "adam_w_mode": ALWAYS,
        },
    },
    "scheduler": ANY,
}
"""Keys that the recipe owns, and what else may stand beside them."""
