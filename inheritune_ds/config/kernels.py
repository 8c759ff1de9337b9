"""The `kernels` block of a DeepSpeed config: which implementations a user asks for. Torch is not imported here.

DeepSpeed does not read this block; the engine takes it out before DeepSpeed sees the config.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ATTENTIONS = ("flash_attention_4", "flash_attention_3", "flash_attention_2", "sdpa", "eager")
"""Fastest first; the names are those of transformers' `attn_implementation`."""
OPTIMIZERS = ("apex", "deepspeed", "torch_fused", "torch")
"""AdamW with the state on the device, fastest first."""
OFFLOADED_OPTIMIZER = "deepspeed_cpu"
"""What every offloaded run takes: DeepSpeedCPUAdam. It cannot be named, since offload_optimizer asks for it."""
LOSSES = ("chunked", "liger", "plain")
"""How head and cross-entropy are computed; `auto` is the first."""
ACTIVATION_CHECKPOINTING = ("none", "selective", "full")
"""What is computed again in the backward pass; `auto` is the first."""
COMPILE_FLOPS_CPU = 1e14
"""From so many FLOPs of a rank on, compiling pays on a CPU: it costs 15 to 30 s cold and gains a tenth, and two cores
do about 4e11 FLOP/s in bf16."""
COMPILE_SECONDS_GPU, COMPILE_MFU = 300.0, 0.4
"""From so long a run at such a share of the GPU's peak on, compiling pays there. Not measured yet."""


@dataclass(frozen=True)
class KernelRequest:
    """What the config asks for; `auto` is left to a machine that has torch.

    Attributes:
        attention: One of `ATTENTIONS`, or auto.
        optimizer: One of `OPTIMIZERS`, or auto.
        liger: Whether Liger's RMSNorm, RoPE and SwiGLU replace the model's, or auto.
        loss: One of `LOSSES`, or auto.
        compile: Whether torch.compile is applied to each block, or auto.
        activation_checkpointing: One of `ACTIVATION_CHECKPOINTING`.
    """

    attention: str = "auto"
    optimizer: str = "auto"
    liger: bool | str = "auto"
    loss: str = "auto"
    compile: bool | str = "auto"
    activation_checkpointing: str = "none"

    @classmethod
    def of(cls, block: Mapping[str, Any]) -> "KernelRequest":
        """Read a checked `kernels` block; what it leaves out has its default."""
        return cls(**block)
