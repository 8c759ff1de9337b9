"""The `kernels` block of a DeepSpeed config: which implementations a user asks for. Torch is not imported here.

DeepSpeed does not read this block; the engine takes it out before DeepSpeed sees the config.
"""

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
"""What every offloaded run takes: DeepSpeedCPUAdam. It cannot be named, since offload_optimizer asks for it."""
Loss = Literal["chunked", "liger", "plain"]
LOSSES: tuple[Loss, ...] = get_args(Loss)
"""How head and cross-entropy are computed; `auto` is the first."""
COMPILE_FLOPS_CPU = 1e14
"""From so many FLOPs of a rank on, compiling pays on a CPU: it costs 15 to 30 s cold and gains a tenth, and two cores
do about 4e11 FLOP/s in bf16."""
COMPILE_SECONDS_GPU, COMPILE_MFU = 300.0, 0.4
"""From so long a run at such a share of the GPU's peak on, compiling pays there. Not measured yet."""


class KernelRequest(ConfigModel):
    """What the config asks for; `auto` is left to a machine that has torch.

    Attributes:
        attention: Which attention.
        optimizer: Which AdamW.
        liger: Whether Liger's RMSNorm, RoPE and SwiGLU replace the model's.
        loss: Which loss.
        compile: Whether torch.compile is applied to each block.
        activation_checkpointing: What is computed again in the backward pass; `auto` is none.
    """

    attention: Auto[Attention] = AUTO
    optimizer: Auto[Optimizer] = AUTO
    liger: Auto[bool] = AUTO
    loss: Auto[Loss] = AUTO
    compile: Auto[bool] = AUTO
    activation_checkpointing: Auto[Recomputation] = "none"
