"""The keys of a DeepSpeed config that are passed on, or owned by the recipe.

The keys are those of DeepSpeed 0.19; a test compares them with the installed package.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints

from inheritune_ds.config.fields import AUTO, Allowed, Auto, ConfigModel
from inheritune_ds.config.kernels import KernelRequest
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.config.reliability import SaveErrorPolicy

OPTIMIZER_TYPE: Literal["AdamW"] = "AdamW"


def _on(value: bool) -> bool:  # noqa: FBT001 - a validator; Literal[True] would accept 1
    if not value:
        raise ValueError
    return value


WHOLE = BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)
"""5e8 is a float in JSON, and an integer."""
Switch = Auto[bool]
AlwaysOn = Auto[Annotated[bool, AfterValidator(_on), Allowed("true")]]
Count = Auto[Annotated[int, Field(ge=0), WHOLE]]
Positive = Auto[Annotated[int, Field(ge=1), WHOLE]]
Number = Auto[Annotated[float, Field(ge=0)]]
Path = Auto[Annotated[Annotated[str, StringConstraints(min_length=1)] | None, Allowed("a path, or null")]]
Precision = Auto[Literal["fp32", "bf16", "fp16"]]
OffloadDevice = Auto[
    Annotated[
        Literal["none", "cpu"],
        Allowed(
            refused="nvme",
            instead="cpu",
            reason="DeepSpeed does not restore a state on NVMe exactly: a resumed run would differ",
        ),
    ]
]


class OffloadParam(ConfigModel):
    """Where ZeRO-3 keeps the weights."""

    device: OffloadDevice = AUTO
    nvme_path: Path = AUTO
    pin_memory: Switch = AUTO
    buffer_count: Count = AUTO
    buffer_size: Count = AUTO
    max_in_cpu: Count = AUTO


class OffloadOptimizer(ConfigModel):
    """Where the optimizer's state is."""

    device: OffloadDevice = AUTO
    nvme_path: Path = AUTO
    pin_memory: Switch = AUTO
    buffer_count: Count = AUTO
    pipeline_read: Switch = AUTO
    pipeline_write: Switch = AUTO
    fast_init: Switch = AUTO
    ratio: Auto[
        Annotated[
            float, Field(ge=1, le=1), Allowed("1; with less DeepSpeed does not save the moments that stay on the GPU")
        ]
    ] = AUTO


class Zero(ConfigModel):
    """ZeRO's sharding and communication."""

    stage: Auto[
        Annotated[
            int,
            Field(ge=1, le=3),
            Allowed(
                "1, 2 or 3", refused=0, instead=1, reason="stage 0 loses precision in bf16 and has no gradient norm"
            ),
        ]
    ] = AUTO
    contiguous_gradients: Switch = AUTO
    reduce_scatter: Switch = AUTO
    reduce_bucket_size: Positive = AUTO
    use_multi_rank_bucket_allreduce: Switch = AUTO
    allgather_partitions: Switch = AUTO
    allgather_bucket_size: Count = AUTO
    overlap_comm: Switch = AUTO
    offload_param: Auto[OffloadParam | None] = AUTO
    offload_optimizer: Auto[OffloadOptimizer | None] = AUTO
    sub_group_size: Count = AUTO
    stage3_prefetch_bucket_size: Count = AUTO
    stage3_param_persistence_threshold: Count = AUTO
    stage3_model_persistence_threshold: Count = AUTO
    stage3_max_live_parameters: Count = AUTO
    stage3_max_reuse_distance: Count = AUTO
    stage3_gather_16bit_weights_on_model_save: Switch = AUTO
    stage3_use_all_reduce_for_fetch_params: Switch = AUTO
    round_robin_gradients: Switch = AUTO
    ignore_unused_parameters: Switch = AUTO
    memory_efficient_linear: Switch = AUTO
    # Under DeepSpeed's names of the fields (SECOND_NAMES):
    prefetch_bucket_size: Count = AUTO
    param_persistence_threshold: Count = AUTO
    model_persistence_threshold: Count = AUTO
    max_live_parameters: Count = AUTO
    max_reuse_distance: Count = AUTO
    gather_16bit_weights_on_model_save: Switch = AUTO
    stage3_gather_fp16_weights_on_model_save: Switch = AUTO
    use_all_reduce_for_fetch_params: Switch = AUTO


class Aio(ConfigModel):
    """Asynchronous input and output."""

    block_size: Positive = AUTO
    queue_depth: Positive = AUTO
    intra_op_parallelism: Positive = AUTO
    single_submit: Switch = AUTO
    overlap_events: Switch = AUTO
    use_gds: Switch = AUTO


class Bf16(ConfigModel):
    """Training in bfloat16."""

    enabled: Switch = AUTO
    check_grad_overflow: Switch = AUTO
    immediate_grad_update: Switch = AUTO


class CommsLogger(ConfigModel):
    """DeepSpeed's log of collectives."""

    enabled: Switch = AUTO
    verbose: Switch = AUTO
    prof_all: Switch = AUTO
    debug: Switch = AUTO
    prof_ops: Auto[Annotated[list[str], Allowed('a list of names, such as ["all_reduce"]')]] = AUTO


class DataTypes(ConfigModel):
    """The type of gradient sums."""

    grad_accum_dtype: Precision = AUTO


class FlopsProfiler(ConfigModel):
    """DeepSpeed's own profile of a step."""

    enabled: Switch = AUTO
    recompute_fwd_factor: Number = AUTO
    profile_step: Positive = AUTO
    module_depth: Auto[Annotated[int, Field(ge=-1), WHOLE]] = AUTO
    top_modules: Positive = AUTO
    detailed: Switch = AUTO
    output_file: Path = AUTO


class Fp16(ConfigModel):
    """Training in half precision, with a scaled loss."""

    enabled: Switch = AUTO
    auto_cast: Switch = AUTO
    loss_scale: Number = AUTO
    initial_scale_power: Count = AUTO
    loss_scale_window: Positive = AUTO
    hysteresis: Positive = AUTO
    consecutive_hysteresis: Switch = AUTO
    min_loss_scale: Positive = AUTO


class Throughput(ConfigModel):
    """DeepSpeed's timer of samples per second."""

    enabled: Switch = AUTO
    synchronized: Switch = AUTO


class Timers(ConfigModel):
    """DeepSpeed's timers."""

    throughput: Auto[Throughput | None] = AUTO


class PassedOn(ConfigModel):
    """Keys passed on to DeepSpeed, which ignores unknown top-level keys.

    Its other keys in bf16, fp16 and data_types keep masters or buffers in half precision.
    """

    aio: Auto[Aio | None] = AUTO
    bf16: Auto[Bf16 | None] = AUTO
    comms_logger: Auto[CommsLogger | None] = AUTO
    communication_data_type: Precision = AUTO
    data_types: Auto[DataTypes | None] = AUTO
    disable_allgather: Switch = AUTO
    disable_python_gc: Switch = AUTO
    dump_state: Switch = AUTO
    flops_profiler: Auto[FlopsProfiler | None] = AUTO
    fp16: Auto[Fp16 | None] = AUTO
    gradient_predivide_factor: Auto[Annotated[float, Field(gt=0)]] = AUTO
    log_level: Auto[Literal["debug", "info", "warning", "error", "critical"]] = AUTO
    memory_breakdown: Switch = AUTO
    prescale_gradients: Switch = AUTO
    steps_per_print: Positive = AUTO
    timers: Auto[Timers | None] = AUTO
    train_micro_batch_size_per_gpu: Auto[Annotated[int, Field(ge=1)]] = AUTO
    wall_clock_breakdown: Switch = AUTO
    zero_allow_untested_optimizer: Switch = AUTO
    zero_force_ds_cpu_optimizer: Switch = AUTO
    zero_optimization: Auto[Zero | None] = AUTO


class OptimizerParams(ConfigModel):
    """The recipe's numbers, and the kind of AdamW."""

    lr: Any = AUTO
    betas: Any = AUTO
    eps: Any = AUTO
    weight_decay: Any = AUTO
    torch_adam: Switch = AUTO
    adam_w_mode: AlwaysOn = AUTO


class Optimizer(ConfigModel):
    """AdamW with the recipe's numbers."""

    type: Auto[
        Annotated[
            Literal["AdamW"], Allowed(refused="Adam", instead="AdamW", reason="DeepSpeed's Adam is AdamW by default")
        ]
    ] = AUTO
    params: Auto[OptimizerParams | None] = AUTO


Seconds = Auto[
    Annotated[float, Field(gt=0, le=1e9), Allowed('seconds above 0, at most 1e9 ("watchdog": false for none)')]
]
"""faulthandler's clock counts nanoseconds in 63 bits: it takes 9.2e9 s."""


class Limits(ConfigModel):
    """The time limits of the phases."""

    start: Seconds = AUTO
    first_step: Seconds = AUTO
    step: Seconds = AUTO
    validation: Seconds = AUTO
    save: Seconds = AUTO
    finish: Seconds = AUTO


class ReliabilityBlock(ConfigModel):
    """Saving on this machine, and time limits; a value that is not set has its default of `Reliability`."""

    async_save: Switch = AUTO
    on_save_error: Auto[SaveErrorPolicy] = AUTO
    watchdog: Switch = AUTO
    watchdog_s: Auto[Limits | None] = AUTO


class Document(PassedOn):
    """All keys that a DeepSpeed config may have; `deepspeed_checks` checks the values of type `Any`."""

    bfloat16: Auto[Bf16 | None] = AUTO
    train_batch_size: Any = AUTO
    gradient_clipping: Any = AUTO
    gradient_accumulation_steps: Any = AUTO
    optimizer: Auto[Optimizer | None] = AUTO
    scheduler: Any = AUTO
    kernels: Auto[KernelRequest | None] = AUTO
    reliability: Auto[ReliabilityBlock | None] = AUTO


OURS = ("kernels", "reliability")
"""Blocks of this program, which DeepSpeed's tools ignore."""


def without_ours(ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved config as DeepSpeed gets it."""
    return {key: value for key, value in ds_config.items() if key not in OURS}


_ZERO = "zero_optimization"
SECOND_NAMES = {
    "bfloat16": "bf16",
    f"{_ZERO}.stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    **{f"{_ZERO}.{name}": f"stage3_{name}" for name in Zero.model_fields if f"stage3_{name}" in Zero.model_fields},
}
"""Other names that DeepSpeed accepts for a key, by path, and the name of the key in the same block."""

RECIPE_OWNED: dict[str, tuple[str, Callable[[Recipe], Any]]] = {
    "train_batch_size": ("training.global_batch_tokens", lambda recipe: recipe.training.batch_windows),
    "gradient_clipping": ("optimizer.max_grad_norm", lambda recipe: recipe.optimizer.max_grad_norm),
    "optimizer.params.lr": ("optimizer.lr", lambda recipe: recipe.optimizer.lr),
    "optimizer.params.betas": ("optimizer.betas", lambda recipe: list(recipe.optimizer.betas)),
    "optimizer.params.eps": ("optimizer.eps", lambda recipe: recipe.optimizer.eps),
    "optimizer.params.weight_decay": ("optimizer.weight_decay", lambda recipe: recipe.optimizer.weight_decay),
}

DERIVED = {"gradient_accumulation_steps": "training.global_batch_tokens / (micro-batch x seq_len x ranks)"}
