"""Arithmetic of a model and its training: parameters, FLOPs, memory, batch, steps, checkpoint bytes.

Conventions, stated once:

FLOPs: PaLM's (arXiv 2204.02311, appendix B). A trained token costs `6 * N_matmul + 12 * L * d * T` FLOPs, with
N_matmul the parameters of the blocks and of the head (tied or not; no input embedding), L blocks, d the hidden
size and T the sequence length. Attention is counted as if it were not causal. The share of a GPU's dense peak that
these FLOPs reach is the MFU. What activation checkpointing computes again is not counted in it; with it, it is the HFU.

Memory: GiB (2**30 bytes) on one GPU at the worse of two moments. In the backward pass there are all activations and
the gradients of earlier micro-steps when it starts, and all gradients when it ends; the worst of it is told. In the
update the passes have left nothing, but DeepSpeed reduces and copies gradients (see `states`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Unpack, cast

from inheritune_ds.activations import Passes, activation_bytes, key_value_size, loss_bytes, mlp_size, working_bytes
from inheritune_ds.errors import RecipeError
from inheritune_ds.layout import Layout, Precision, Recomputation, element_bytes, uses_bf16_optimizer
from inheritune_ds.recipe import Shape, Training
from inheritune_ds.states import States, Tensors, states

GIB = float(2**30)
LOSS_CHUNK_TOKENS = 1024
"""Tokens whose logits exist at once under the chunked loss (`training.loss` works in chunks of this size)."""
_FIXED_MARGIN_GIB = 1.0
"""CUDA context and the workspaces of cuBLAS and NCCL."""
_FRAGMENTATION_RATIO = 0.05
"""Blocks that the allocator holds without using them."""


@dataclass(frozen=True)
class Parameters:
    """Trainable parameters by part; `total` counts a tied head once, with the embeddings.

    Attributes:
        total: All of them.
        blocks: In all transformer blocks.
        per_block: In one block.
        embeddings: Token embeddings, and position embeddings (gpt2).
        head: The output projection; 0 when tied to the token embeddings.
        final_norm: The norm after the last block.
    """

    total: int
    blocks: int
    per_block: int
    embeddings: int
    head: int
    final_norm: int


def parameters(shape: Shape, num_blocks: int | None = None) -> Parameters:
    """Count parameters as `transformers` builds the model (gpt2 has biases and learned positions).

    Args:
        shape: The architecture.
        num_blocks: Blocks, when they are not the shape's own `num_hidden_layers`.
    """
    hidden, mlp = shape.hidden_size, mlp_size(shape)
    if shape.model_type == "gpt2":
        attention = 4 * (hidden * hidden + hidden)
        per_block = attention + (2 * hidden * mlp + mlp + hidden) + 2 * (2 * hidden)
        embeddings = (shape.vocab_size + shape.max_position_embeddings) * hidden
        final_norm = 2 * hidden
    else:
        attention = 2 * hidden * hidden + 2 * hidden * key_value_size(shape)
        per_block = attention + 3 * hidden * mlp + 2 * hidden
        embeddings = shape.vocab_size * hidden
        final_norm = hidden
    blocks = per_block * (shape.num_hidden_layers if num_blocks is None else num_blocks)
    head = 0 if shape.tie_word_embeddings else shape.vocab_size * hidden
    return Parameters(blocks + embeddings + head + final_norm, blocks, per_block, embeddings, head, final_norm)


def tensors(shape: Shape, num_blocks: int) -> Tensors:
    """Elements of each parameter as `transformers` builds the model, and whether weight decay applies.

    Matrices decay; norms, biases and embeddings (a tied head among them) do not (`training.optimizer`).

    Args:
        shape: The architecture.
        num_blocks: Transformer blocks.
    """
    hidden, mlp, embeddings = shape.hidden_size, mlp_size(shape), shape.vocab_size * shape.hidden_size
    if shape.model_type == "gpt2":
        norm = [(hidden, False), (hidden, False)]
        attention = [(3 * hidden * hidden, True), (3 * hidden, False), (hidden * hidden, True), (hidden, False)]
        feed_forward = [(hidden * mlp, True), (mlp, False), (mlp * hidden, True), (hidden, False)]
        first, last = [(embeddings, False), (shape.max_position_embeddings * hidden, False)], norm
    else:
        norm, key_value = [(hidden, False)], hidden * key_value_size(shape)
        attention = [(hidden * hidden, True), (key_value, True), (key_value, True), (hidden * hidden, True)]
        feed_forward = [(hidden * mlp, True), (hidden * mlp, True), (mlp * hidden, True)]
        first = [(embeddings, False)]
        last = norm if shape.tie_word_embeddings else [*norm, (embeddings, True)]
    sizes, decayed = zip(*first, *[*norm, *attention, *norm, *feed_forward] * num_blocks, *last, strict=True)
    return Tensors(sizes, decayed)


def flops_per_token(shape: Shape, num_blocks: int, seq_len: int) -> float:
    """FLOPs of one trained token, forward and backward, in the module's convention.

    Args:
        shape: The architecture.
        num_blocks: Transformer blocks.
        seq_len: Tokens a window.
    """
    matmul = parameters(shape, num_blocks).blocks + shape.vocab_size * shape.hidden_size
    return 6.0 * matmul + 12.0 * num_blocks * shape.hidden_size * seq_len


def hardware_flops_per_token(shape: Shape, num_blocks: int, seq_len: int, recomputation: Recomputation) -> float:
    """FLOPs of one trained token with what is computed again: the blocks' forward pass, all of it under `full`.

    `selective` keeps the outputs of matrix products and attention, where nearly all FLOPs are.

    Args:
        shape: The architecture.
        num_blocks: Transformer blocks.
        seq_len: Tokens a window.
        recomputation: What of a block is computed again.
    """
    flops = flops_per_token(shape, num_blocks, seq_len)
    if recomputation != "full":
        return flops
    return flops + 2.0 * parameters(shape, num_blocks).blocks + 4.0 * num_blocks * shape.hidden_size * seq_len


@dataclass(frozen=True)
class Memory:
    """Memory of one GPU by part, in GiB, at two moments; `host_gib` is what offloading takes from the host, a GPU.

    Attributes:
        backward: Parts in the backward pass.
        update: Parts while gradients are reduced and weights updated.
        host_gib: On the host.
    """

    backward: Mapping[str, float]
    update: Mapping[str, float]
    host_gib: float

    @property
    def parts(self) -> Mapping[str, float]:
        """The parts of the worse moment."""
        return max(self.backward, self.update, key=lambda parts: sum(parts.values()))

    @property
    def total_gib(self) -> float:
        """The peak: sum of the parts of the worse moment."""
        return sum(self.parts.values())

    @property
    def tensors_gib(self) -> float:
        """The peak without the margin, which is what a count of live tensors finds."""
        return self.total_gib - self.parts["margin"]


def memory(
    shape: Shape, num_blocks: int, *, micro_batch_size: int, accumulation: int, **layout: Unpack[Layout]
) -> Memory:
    """Predict the peak memory of one GPU.

    Args:
        shape: The architecture.
        num_blocks: Transformer blocks.
        micro_batch_size: Sequences a rank holds at once.
        accumulation: Micro-steps a step.
        **layout: How DeepSpeed lays the model out.
    """
    found = states(tensors(shape, num_blocks), layout, accumulation=accumulation)
    moments = _passes(shape, num_blocks, micro_batch_size * layout["seq_len"], layout, found)
    backward = max(moments, key=lambda parts: sum(parts.values()))
    update = _joined(found.resident, found.update)
    return Memory(_with_margin(backward), _with_margin(update), found.host / GIB)


def _passes(shape: Shape, num_blocks: int, tokens: int, layout: Layout, found: States) -> list[dict[str, float]]:
    """Bytes by part when the backward pass starts, when it has come to the last block, and when it ends."""
    passes = Passes(
        tokens,
        layout["seq_len"],
        element_bytes(layout["precision"]),
        layout.get("activation_checkpointing", "none"),
        layout.get("loss", "chunked"),
    )
    kept, working = activation_bytes(shape, num_blocks, passes), working_bytes(shape, passes)
    logits = loss_bytes(shape, passes, chunk_tokens=LOSS_CHUNK_TOKENS)
    start = {"activations": float(kept), "logits and loss": float(logits)}
    last_block = {"activations": float(kept + working)}
    first_block = {"activations": float(activation_bytes(shape, 1, replace(passes, recomputation="none")))}
    moments = ((found.first, start), (found.going, last_block), (found.last, first_block))
    return [_joined(found.resident, gradients, activations) for gradients, activations in moments]


def _joined(*parts: Mapping[str, float]) -> dict[str, float]:
    """Sums by name, in the order of their first appearance."""
    joined: dict[str, float] = {}
    for name, size in ((name, size) for part in parts for name, size in part.items() if size):
        joined[name] = joined.get(name, 0.0) + size
    return joined


def _with_margin(sizes: Mapping[str, float]) -> dict[str, float]:
    """Bytes as GiB, and what the device and its allocator take besides."""
    parts = {name: size / GIB for name, size in sizes.items()}
    return {**parts, "margin": _FIXED_MARGIN_GIB + _FRAGMENTATION_RATIO * sum(parts.values())}


def largest_micro_batch(
    shape: Shape, num_blocks: int, *, memory_gib: float, batch_windows: int, **layout: Unpack[Layout]
) -> int:
    """Find the largest micro-batch that fits and divides a rank's share of the batch.

    Args:
        shape: The architecture.
        num_blocks: Transformer blocks.
        memory_gib: Memory that one rank may use.
        batch_windows: Sequences of a whole step, over all ranks.
        **layout: As for `memory`.

    Raises:
        RecipeError: When not even one sequence fits, or the ranks cannot share the batch evenly.
    """
    ranks = layout["world_size"]
    if batch_windows % ranks:
        raise RecipeError(
            f"a step of {batch_windows} sequences cannot be shared evenly by {ranks} ranks",
            allowed=f"a multiple of {ranks} sequences",
            action="change training.global_batch_tokens or the number of ranks",
        )
    share = batch_windows // ranks
    for size in range(share, 0, -1):
        if share % size == 0 and _total(shape, num_blocks, size, share // size, layout) <= memory_gib:
            return size
    raise does_not_fit(shape, num_blocks, memory_gib=memory_gib, micro_batch_size=1, accumulation=share, **layout)


def _total(shape: Shape, num_blocks: int, micro_batch_size: int, accumulation: int, layout: Layout) -> float:
    need = memory(shape, num_blocks, micro_batch_size=micro_batch_size, accumulation=accumulation, **layout)
    return need.total_gib


def does_not_fit(
    shape: Shape,
    num_blocks: int,
    *,
    memory_gib: float,
    micro_batch_size: int,
    accumulation: int,
    **layout: Unpack[Layout],
) -> RecipeError:
    """Say how much is missing, and which changes of the DeepSpeed config would make it fit.

    Args:
        shape: The architecture.
        num_blocks: Transformer blocks.
        memory_gib: Memory that one rank may use.
        micro_batch_size: Sequences a rank holds at once.
        accumulation: Micro-steps a step.
        **layout: As for `memory`.
    """
    need = memory(shape, num_blocks, micro_batch_size=micro_batch_size, accumulation=accumulation, **layout)
    largest = max(need.parts, key=lambda part: need.parts[part])
    share = micro_batch_size * accumulation
    what = "one sequence" if micro_batch_size == 1 else f"{micro_batch_size} sequences"
    needs = "needs" if micro_batch_size == 1 else "need"
    return RecipeError(
        f"{what} of {layout['seq_len']} tokens {needs} {need.total_gib:.1f} GiB, {need.parts[largest]:.1f} GiB of "
        f"it {largest}, but a rank has {memory_gib:.1f} GiB",
        allowed="a model, precision and ZeRO stage that fit",
        action=_advice(
            lambda size, changed: _total(shape, num_blocks, size, share // size, changed) <= memory_gib,
            micro_batch_size,
            share,
            layout,
        ),
    )


_CHANGES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ('kernels.loss "chunked"', {"loss": "chunked"}),
    ("bf16.immediate_grad_update true", {"immediate_grad_update": True}),
    ('kernels.activation_checkpointing "selective"', {"activation_checkpointing": "selective"}),
    ('kernels.activation_checkpointing "full"', {"activation_checkpointing": "full"}),
    ('data_types.grad_accum_dtype "bf16"', {"accumulate_fp32": False}),
    ("ds_configs/zero2.json", {"zero_stage": 2}),
    ("ds_configs/zero3.json", {"zero_stage": 3}),
)
"""What makes a run need less memory, the cheapest in time first; keys are those of `Layout`."""
_OFFLOAD = {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}


def _advice(fits: Callable[[int, Layout], bool], micro_batch_size: int, share: int, layout: Layout) -> str:
    """What makes it fit: a smaller micro-batch, else each change that does alone, else the first ones together."""
    for size in range(micro_batch_size - 1, 0, -1):
        if share % size == 0 and fits(size, layout):
            return f"set train_micro_batch_size_per_gpu to {size}"
    possible = [(words, change) for words, change in _CHANGES if _can_change(layout, change)]
    alone = [words for words, change in possible if fits(micro_batch_size, _changed(layout, change))]
    if alone:
        return f"take {' or '.join(alone[:3])}"
    together: dict[str, str] = {}
    changed = layout
    for words, change in possible:
        changed = _changed(changed, change)
        together[next(iter(change))] = words  # a later value of the same key takes its place
        if fits(micro_batch_size, changed):
            return f"take {' and '.join(together.values())}"
    if fits(micro_batch_size, _changed(layout, _OFFLOAD)):
        return "take ds_configs/zero3_offload.json"
    return "use more ranks, or a GPU with more memory"


def _changed(layout: Layout, change: Mapping[str, Any]) -> Layout:
    return cast(Layout, {**layout, **change})


def _can_change(layout: Layout, change: Mapping[str, Any]) -> bool:
    """Whether a change is one in this layout: sharing takes several ranks, other keys half precision."""
    if all({"loss": "chunked", **layout}.get(key) == value for key, value in change.items()):
        return False
    if "accumulate_fp32" in change:
        return layout["precision"] == "bf16"
    if "immediate_grad_update" in change:
        return uses_bf16_optimizer(layout)
    if "zero_stage" in change:
        return bool(change["zero_stage"] > layout["zero_stage"] and layout["world_size"] > 1)
    return True


def tokens_an_epoch(unique_tokens: int, seq_len: int) -> int:
    """Tokens predicted in one pass over the whole windows (a window needs one token more than it predicts)."""
    return max(unique_tokens - 1, 0) // seq_len * seq_len


def steps_in(training: Training, epoch_tokens: int | None) -> int | None:
    """Optimizer steps of a recipe: the whole steps that fit its duration; None for epochs of unknown length.

    Args:
        training: Duration and batch.
        epoch_tokens: Tokens of all windows of the corpus; None when it is not known yet.

    Raises:
        RecipeError: When the duration is shorter than one step.
    """
    count, unit = training.duration_parts
    if unit == "steps":
        return count
    if unit == "epochs":
        if epoch_tokens is None:
            return None
        count *= epoch_tokens
    steps = count // training.global_batch_tokens
    if steps == 0:
        raise RecipeError(
            f"training.duration {training.duration!r} is {count} tokens, less than one step of "
            f"{training.global_batch_tokens} tokens",
            allowed=f"at least {training.global_batch_tokens} tokens",
            action="make training.duration longer or training.global_batch_tokens smaller",
        )
    return steps


def checkpoint_bytes(count: int, precision: Precision) -> int:
    """Bytes of one checkpoint over all ranks: weights, fp32 master weights and both Adam moments.

    Args:
        count: Parameters.
        precision: What the model computes in.
    """
    return count * (element_bytes(precision) + 4 + 8)
