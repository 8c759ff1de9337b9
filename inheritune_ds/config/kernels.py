"""The `kernels` block of a DeepSpeed config: requested implementations. The engine removes it for DeepSpeed."""

from typing import Literal, get_args

from inheritune_ds.config.fields import AUTO, Auto, ConfigModel
from inheritune_ds.config.zero import Recomputation

Attention = Literal["flash_attention_4", "flash_attention_3", "flash_attention_2", "sdpa", "eager"]
ATTENTIONS: tuple[Attention, ...] = get_args(Attention)
"""Fastest first; the names are those of transformers' `attn_implementation`."""
Optimizer = Literal["apex", "deepspeed", "torch_fused", "torch"]
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
"""AdamW with the state on the device, fastest first."""
OFFLOADED_OPTIMIZER = "deepspeed_cpu"
"""DeepSpeedCPUAdam, which offload_optimizer always uses; a config cannot name it."""
Loss = Literal["chunked", "liger", "plain"]
LOSSES: tuple[Loss, ...] = get_args(Loss)
"""Implementations of head and cross-entropy; `auto` is the first."""
COMPILE_FLOPS_CPU = 1e14
"""Least FLOPs of a rank for which compiling pays on a CPU: it costs 15 to 30 s cold and gains a tenth, and two cores
do about 4e11 FLOP/s in bf16."""
COMPILE_SECONDS_GPU, COMPILE_MFU = 300.0, 0.4
"""Least seconds of a run, at this share of the GPU's peak, for which compiling pays there. Not measured yet."""


class KernelRequest(ConfigModel):
    """The requested implementations; `training.kernels` resolves `auto`."""

    attention: Auto[Attention] = AUTO
    optimizer: Auto[Optimizer] = AUTO
    liger: Auto[bool] = AUTO
    """Whether Liger's RMSNorm, RoPE and SwiGLU replace the model's."""
    loss: Auto[Loss] = AUTO
    compile: Auto[bool] = AUTO
    """Whether torch.compile is applied to each block."""
    activation_checkpointing: Auto[Recomputation] = "none"
    """Activations that the backward pass recomputes; `auto` is none."""
