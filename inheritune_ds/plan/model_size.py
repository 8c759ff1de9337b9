"""Parameters, FLOPs per token and checkpoint size of a model shape.

FLOPs: PaLM's (arXiv 2204.02311, appendix B). A trained token costs `6 * N_matmul + 12 * L * d * T` FLOPs, with
N_matmul the parameters of the blocks and of the head (tied or not; no input embedding), L blocks, d the hidden
size and T the sequence length. Attention is counted as if it were not causal. The share of a GPU's dense peak that
these FLOPs reach is the MFU, and with recomputation of activations the HFU. The floor in hours (`Budget.floor_flops`)
counts attention as causal.
"""

from dataclasses import dataclass

from inheritune_ds.config.model import Shape
from inheritune_ds.config.zero import Recomputation
from inheritune_ds.plan.activations import key_value_size, mlp_size
from inheritune_ds.plan.zero_memory import Tensors

GIB = float(2**30)


@dataclass(frozen=True)
class Parameters:
    """Trainable parameters by part.

    Attributes:
        embeddings: Token embeddings, and position embeddings (gpt2).
        head: The output projection; 0 when tied to the token embeddings.
    """

    total: int
    blocks: int
    per_block: int
    embeddings: int
    head: int
    final_norm: int


def parameters(shape: Shape, num_blocks: int | None = None) -> Parameters:
    """Count the parameters of the `transformers` model; the default of `num_blocks` is `num_hidden_layers`."""
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
    """Elements of each parameter of the `transformers` model, and whether weight decay applies.

    It applies to matrices, not to norms, biases and embeddings including a tied head (`training.optimizer`).
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


def flops_per_token(shape: Shape, num_blocks: int, positions: float) -> float:
    """FLOPs of one trained token, forward and backward, that attends to `positions`: T in the module's convention."""
    matmul = parameters(shape, num_blocks).blocks + shape.vocab_size * shape.hidden_size
    return 6.0 * matmul + 12.0 * num_blocks * shape.hidden_size * positions


def hardware_flops_per_token(shape: Shape, num_blocks: int, positions: float, recomputation: Recomputation) -> float:
    """FLOPs of one trained token with recomputation: `full` repeats the blocks' forward pass.

    `selective` keeps the outputs of matrix products and attention, which have nearly all FLOPs. `positions` are those
    that a token attends to: the sequence length in the module's convention.
    """
    flops = flops_per_token(shape, num_blocks, positions)
    if recomputation != "full":
        return flops
    return flops + 2.0 * parameters(shape, num_blocks).blocks + 4.0 * num_blocks * shape.hidden_size * positions


def checkpoint_bytes(count: int) -> int:
    """Bytes of a checkpoint of `count` parameters over all ranks: fp32 masters and both Adam moments."""
    return count * (4 + 8)
