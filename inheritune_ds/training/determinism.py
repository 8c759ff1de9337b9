"""The deterministic mode: the same bits from the same numbers, in every process on the same GPUs and software.

Without it the backward passes of attention on a GPU add in the order in which their threads arrive, and cuBLAS may
choose another split of a sum.
"""

from collections.abc import MutableMapping

import torch

from inheritune_ds.errors import MachineError

CUBLAS_WORKSPACES = (":4096:8", ":16:8")
"""Values of CUBLAS_WORKSPACE_CONFIG with which cuBLAS is deterministic (its manual, "Results Reproducibility")."""


def compute_deterministically(environ: MutableMapping[str, str]) -> None:
    """Let this process compute deterministically; call it before CUDA starts.

    torch then uses deterministic kernels, refuses operators without one, passes by cuDNN's attention, and tunes no
    compiled reduction. transformers asks flash-attention for its deterministic backward pass.

    Raises:
        MachineError: If the environment makes cuBLAS nondeterministic.
    """
    workspace = environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES[0])
    if workspace not in CUBLAS_WORKSPACES:
        raise MachineError(
            f"kernels.deterministic is true, but cuBLAS is not deterministic with CUBLAS_WORKSPACE_CONFIG={workspace}",
            allowed=" or ".join(CUBLAS_WORKSPACES),
            action='unset CUBLAS_WORKSPACE_CONFIG, or write "deterministic": false in the DeepSpeed config',
        )
    environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
    torch.use_deterministic_algorithms(mode=True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
