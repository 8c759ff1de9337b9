"""Arithmetic of a model and its training: parameters, FLOPs, memory, batch, steps, checkpoint bytes.

Conventions, stated once:

FLOPs: PaLM's (arXiv 2204.02311, appendix B). A trained token costs `6 * N_matmul + 12 * L * d * T` FLOPs, with
N_matmul the parameters of the blocks and of the head (tied or not; no input embedding), L blocks, d the hidden
size and T the sequence length. Attention is counted as if it were not causal, and nothing is recomputed.

Memory: GiB (2**30 bytes) on one GPU at the worst moment of a step, the backward pass, with all gradients and all
activations counted together (in truth the one grows while the other shrinks). Activations are a count of the
tensors that Hugging Face's own modules save for the backward pass (see `_block_activations`), good to +-20 %.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack

from inheritune_ds.errors import RecipeError
from inheritune_ds.recipe import Shape, Training

GIB = float(2**30)
Precision = Literal["fp32", "bf16", "fp16"]

_FIXED_MARGIN_GIB = 1.0
"""CUDA context and the workspaces of cuBLAS and NCCL."""
_FRAGMENTATION_RATIO = 0.05
"""Blocks that the allocator holds without using them; reduce buckets (Hugging Face's `auto`: hidden_size ** 2
elements, some 40 MB) are in here, too."""
LOSS_CHUNK_TOKENS = 1024
"""Tokens whose logits exist at once under the chunked loss (`training.loss` works in chunks of this size)."""
_MAX_LIVE_PARAMETERS = 10**9
"""ZeRO-3 keeps up to this many gathered parameters (DeepSpeed's stage3_max_live_parameters)."""


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
        attention = 2 * hidden * hidden + 2 * hidden * _key_value_size(shape)
        per_block = attention + 3 * hidden * mlp + 2 * hidden
        embeddings = shape.vocab_size * hidden
        final_norm = hidden
    blocks = per_block * (shape.num_hidden_layers if num_blocks is None else num_blocks)
    head = 0 if shape.tie_word_embeddings else shape.vocab_size * hidden
    return Parameters(blocks + embeddings + head + final_norm, blocks, per_block, embeddings, head, final_norm)


def mlp_size(shape: Shape) -> int:
    """Units of the MLP."""
    return shape.intermediate_size or 4 * shape.hidden_size


def _key_value_size(shape: Shape) -> int:
    heads = shape.num_attention_heads
    return shape.hidden_size // heads * (shape.num_key_value_heads or heads)


def flops_per_token(shape: Shape, num_blocks: int, seq_len: int) -> float:
    """FLOPs of one trained token, forward and backward, in the module's convention.

    Args:
        shape: The architecture.
        num_blocks: Transformer blocks.
        seq_len: Tokens a window.
    """
    matmul = parameters(shape, num_blocks).blocks + shape.vocab_size * shape.hidden_size
    return 6.0 * matmul + 12.0 * num_blocks * shape.hidden_size * seq_len


class Layout(TypedDict):
    """How DeepSpeed lays a model out: the keyword arguments that `memory` and its callers share."""

    seq_len: int
    zero_stage: int
    world_size: int
    precision: Precision
    accumulate_fp32: bool
    offload_optimizer: bool
    offload_parameters: bool


@dataclass(frozen=True)
class Memory:
    """Memory of one GPU by part, in GiB; `host_gib` is what offloading takes from the host, for each GPU."""

    parts: Mapping[str, float]
    host_gib: float

    @property
    def total_gib(self) -> float:
        """Sum of the parts."""
        return sum(self.parts.values())


def memory(shape: Shape, num_blocks: int, *, micro_batch_size: int, **layout: Unpack[Layout]) -> Memory:
    """Predict the peak memory of one GPU.

    Args:
        shape: The architecture.
        num_blocks: Transformer blocks.
        micro_batch_size: Sequences a rank holds at once.
        **layout: Sequence length, ZeRO stage, ranks, precision, accumulation and offload.
    """
    states, host = _states(parameters(shape, num_blocks).total, layout)
    element, tokens = _element_bytes(layout["precision"]), micro_batch_size * layout["seq_len"]
    # A rotary model also keeps one table of sines and one of cosines for all blocks.
    rotary = 2 * element * shape.hidden_size // shape.num_attention_heads if shape.model_type == "llama" else 0
    activations = tokens * (num_blocks * _block_activations(shape, element) + _edge_activations(shape, element))
    states["activations"] = activations + rotary * layout["seq_len"]
    # Held together when the backward pass starts: the logits in the model's type, the fp32 log-probabilities that
    # cross-entropy saved, and their fp32 gradient (in the forward pass: the fp32 copy of the logits instead).
    states["logits and loss"] = tokens * shape.vocab_size * (element + 4 + 4)
    parts = {name: size / GIB for name, size in states.items() if size}
    parts["margin"] = _FIXED_MARGIN_GIB + _FRAGMENTATION_RATIO * sum(parts.values())
    return Memory(parts, host / GIB)


def _element_bytes(precision: Precision) -> int:
    return 4 if precision == "fp32" else 2


def _states(count: int, layout: Layout) -> tuple[dict[str, float], float]:
    """Bytes of weights, gradients and optimizer on the GPU by part, and bytes on the host.

    Read from DeepSpeed 0.19.8: ZeRO-1 with bf16 and fp32 accumulation is its BF16_Optimizer, which keeps the whole
    fp32 accumulator on every rank; ZeRO-2 and 3 keep a rank's share, on the host when the optimizer is there.
    ZeRO-1 and 2 copy the rank's share of fp32 weights into a master even when the model is fp32.
    """
    stage, ranks, element = layout["zero_stage"], layout["world_size"], _element_bytes(layout["precision"])
    shared = {number: float(ranks) if stage >= number else 1.0 for number in (1, 2, 3)}
    host = 0.0
    sizes: dict[str, float] = {"weights": element * count / shared[3]}
    if stage == 3:
        if layout["offload_parameters"]:
            host += sizes.pop("weights")
        resident = 0.0 if layout["offload_parameters"] else 1.0 / ranks
        sizes["gathered weights"] = element * min(count, _MAX_LIVE_PARAMETERS) * (1.0 - resident)
    sizes["gradients"] = element * count / shared[2]
    optimizer: dict[str, float] = {}
    if layout["accumulate_fp32"] and element == 2:
        where = optimizer if stage >= 2 else sizes
        where["fp32 gradient accumulator"] = 4 * count / shared[2]
    if element == 2 or stage >= 1:
        optimizer["fp32 master weights"] = 4 * count / shared[1]
    optimizer["Adam moments"] = 8 * count / shared[1]
    if layout["offload_optimizer"]:
        return sizes, host + sum(optimizer.values())
    return {**sizes, **optimizer}, host


def _block_activations(shape: Shape, element: int) -> int:
    """Bytes a token that one block saves for the backward pass (sdpa or flash attention, dropout 0, not compiled).

    Counted with `torch.autograd.graph.saved_tensors_hooks` on transformers 5.23; the test repeats the count.
    llama, each RMSNorm: its input upcast to fp32, 1/rms (fp32), the normalised input; its output. Attention: rotated
    q and k, v, the output, the log-sum-exp (fp32, a head). MLP: gate, silu(gate), up, their product.
    gpt2, each LayerNorm: its input, mean and 1/std, its output. Attention: q, k, v in one tensor, the output, the
    log-sum-exp. MLP: five tensors of the MLP's width, as `gelu_new` is written in elementary operations.
    Head sizes that are no multiple of 8 make the GPU kernels pad copies: part of the +-20 %.
    """
    hidden, mlp, log_sum_exp = shape.hidden_size, mlp_size(shape), 4 * shape.num_attention_heads
    if shape.model_type == "gpt2":
        norms = 2 * (2 * element * hidden + 8)
        return norms + element * (3 * hidden + hidden) + log_sum_exp + 5 * element * mlp
    norms = 2 * (4 * hidden + 4 + 2 * element * hidden)
    return norms + element * (2 * hidden + 2 * _key_value_size(shape)) + log_sum_exp + 4 * element * mlp


def _edge_activations(shape: Shape, element: int) -> int:
    """Bytes a token outside the blocks: final norm, token ids and labels (int64)."""
    if shape.model_type == "gpt2":
        return 2 * element * shape.hidden_size + 8 + 16
    return 4 * shape.hidden_size + 4 + 2 * element * shape.hidden_size + 16


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
        if share % size == 0 and memory(shape, num_blocks, micro_batch_size=size, **layout).total_gib <= memory_gib:
            return size
    need = memory(shape, num_blocks, micro_batch_size=1, **layout)
    largest = max(need.parts, key=lambda part: need.parts[part])
    raise RecipeError(
        f"one sequence of {layout['seq_len']} tokens needs {need.total_gib:.1f} GiB, {need.parts[largest]:.1f} GiB of "
        f"it {largest}, but a rank has {memory_gib:.1f} GiB",
        allowed="a model, precision and ZeRO stage that fit",
        action="use more ranks with ds_configs/zero3.json, or offload with ds_configs/zero3_offload.json",
    )


def tokens_an_epoch(unique_tokens: int, seq_len: int) -> int:
    """Tokens predicted in one pass over the whole windows (a window needs one token more than it predicts)."""
    return max(unique_tokens - 1, 0) // seq_len * seq_len


def steps_in(training: Training, unique_tokens: int | None) -> int | None:
    """Optimizer steps of a recipe: the whole steps that fit its duration; None for epochs of unknown length.

    Args:
        training: Duration and batch.
        unique_tokens: Training tokens of the corpus; None when it is not known yet.

    Raises:
        RecipeError: When the duration is shorter than one step.
    """
    count, unit = training.duration_parts
    if unit == "steps":
        return count
    if unit == "epochs":
        if unique_tokens is None:
            return None
        count *= tokens_an_epoch(unique_tokens, training.seq_len)
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
    return count * (_element_bytes(precision) + 4 + 8)
