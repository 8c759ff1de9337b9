"""The planner's predictions for a case on one GPU: the only user of the planner in the GPU check."""

from inheritune_ds.config.deepspeed import Resolved
from inheritune_ds.config.model import Shape
from inheritune_ds.config.zero import ZeroSettings, read_layout
from inheritune_ds.plan.gpus import PLANNING_MFU, Gpu
from inheritune_ds.plan.memory import memory
from inheritune_ds.plan.scaling import Job, scaled


def predicted_gib(shape: Shape, resolved: Resolved) -> float:
    """Peak memory of live tensors, in GiB: without the margin for context and allocator."""
    need = memory(
        shape,
        shape.num_hidden_layers,
        micro_batch_size=resolved.micro_batch_size,
        accumulation=resolved.gradient_accumulation_steps,
        **_layout(shape, resolved),
    )
    return need.tensors_gib


def predicted_tokens_per_s(shape: Shape, resolved: Resolved, on: Gpu) -> float:
    """Tokens a second at the MFU that plans assume."""
    size, accumulation = resolved.micro_batch_size, resolved.gradient_accumulation_steps
    job = Job(shape, shape.num_hidden_layers, _layout(shape, resolved), size, accumulation, size * accumulation)
    return scaled(job, on, PLANNING_MFU, 1).weak_rate


def _layout(shape: Shape, resolved: Resolved) -> ZeroSettings:
    return read_layout(resolved.config, seq_len=shape.max_position_embeddings, world_size=1)
