"""Bytes that the forward pass keeps for the backward pass, and those of the logits and the loss.

Counted on the modules of transformers 5.23 (sdpa or flash attention, dropout 0, not compiled, no Liger kernels; those
keep less) with `torch.autograd.graph.saved_tensors_hooks`; tests/test_activations.py repeats the count. Eager attention
keeps all scores besides. `element` is the bytes of one number of the passes: 2 for half precision, 4 for fp32.
"""

from dataclasses import dataclass

from inheritune_ds.config.model import Shape
from inheritune_ds.config.zero import Loss, Recomputation


@dataclass(frozen=True)
class Passes:
    """What a rank's forward and backward pass of one micro-batch is like.

    Attributes:
        tokens: Of the micro-batch.
        seq_len: Tokens a window.
        element: Bytes of one number.
        recomputation: What of a block is computed again in the backward pass.
        loss: Whether all logits exist at once.
    """

    tokens: int
    seq_len: int
    element: int
    recomputation: Recomputation
    loss: Loss


def mlp_size(shape: Shape) -> int:
    """Units of the MLP."""
    return shape.intermediate_size or 4 * shape.hidden_size


def key_value_size(shape: Shape) -> int:
    """Width of all keys of a token, and of all values."""
    heads = shape.num_attention_heads
    return shape.hidden_size // heads * (shape.num_key_value_heads or heads)


def activation_bytes(shape: Shape, num_blocks: int, passes: Passes) -> int:
    """Bytes kept at the end of the forward pass, without logits and loss.

    Args:
        shape: The architecture.
        num_blocks: Transformer blocks.
        passes: The micro-batch, and what is done with it.
    """
    element = passes.element
    # A rotary model also keeps one table of sines and one of cosines for all blocks.
    rotary = 2 * element * shape.hidden_size // shape.num_attention_heads if shape.model_type == "llama" else 0
    kept = {"none": _block, "selective": _block_selective, "full": _block_input}[passes.recomputation](shape, element)
    return passes.tokens * (num_blocks * kept + _edges(shape, element, passes.loss)) + rotary * passes.seq_len


def working_bytes(shape: Shape, passes: Passes) -> int:
    """Bytes besides what is kept while the backward pass goes through one block.

    These are the activations that are computed again, and what is under way: intermediate results and gradients, found
    by counting live tensors (`python -m benchmarks.memory`).

    Args:
        shape: The architecture.
        passes: The micro-batch, and what is done with it.
    """
    wide = 2 if shape.model_type == "gpt2" else 1
    under_way = passes.element * (wide * mlp_size(shape) + shape.hidden_size)
    if passes.recomputation == "none":
        return passes.tokens * under_way
    kept = _matmul_outputs(shape, passes.element) if passes.recomputation == "selective" else 0
    return passes.tokens * (max(_block(shape, passes.element) - kept, 0) + under_way)


def _block(shape: Shape, element: int) -> int:
    """Bytes a token that one block keeps.

    llama, each RMSNorm: its input upcast to fp32 (the input itself when it is fp32), 1/rms (fp32), the normalised
    input; its output. Attention: rotated q and k, v, the output, the log-sum-exp (fp32, a head). MLP: gate, silu(gate),
    up, their product.
    gpt2, each LayerNorm: its input, mean and 1/std, its output. Attention: q, k, v in one tensor, the output, the
    log-sum-exp. MLP: five tensors of the MLP's width, as `gelu_new` is written in elementary operations.
    Head sizes that are no multiple of 8 make GPU kernels pad copies.
    """
    hidden, mlp, log_sum_exp = shape.hidden_size, mlp_size(shape), 4 * shape.num_attention_heads
    if shape.model_type == "gpt2":
        norms = 2 * (2 * element * hidden + 8)
        return norms + element * (3 * hidden + hidden) + log_sum_exp + 5 * element * mlp
    norms = 2 * (4 * hidden + 4 + 2 * element * hidden)
    return norms + element * (2 * hidden + 2 * key_value_size(shape)) + log_sum_exp + 4 * element * mlp


def _matmul_outputs(shape: Shape, element: int) -> int:
    """Bytes a token of the outputs of a block's matrix products and of its attention."""
    hidden, mlp = shape.hidden_size, mlp_size(shape)
    inner = mlp if shape.model_type == "gpt2" else 2 * mlp
    projections = hidden + 2 * key_value_size(shape) + hidden + inner + hidden
    return element * (projections + hidden) + 4 * shape.num_attention_heads


def _block_input(shape: Shape, element: int) -> int:
    return element * shape.hidden_size


def _block_selective(shape: Shape, element: int) -> int:
    return _block_input(shape, element) + _matmul_outputs(shape, element)


def _edges(shape: Shape, element: int, loss: Loss) -> int:
    """Bytes a token outside the blocks: final norm, the head's input, token ids and targets (int64)."""
    head_input = element * shape.hidden_size if loss == "plain" else 0
    if shape.model_type == "gpt2":
        return element * shape.hidden_size + 8 + head_input + 16
    return 4 * shape.hidden_size + 4 + element * shape.hidden_size + head_input + 16


def loss_bytes(shape: Shape, passes: Passes, *, chunk_tokens: int) -> int:
    """Most bytes of logits, loss and their gradients at one time.

    plain, in the backward pass: the fp32 log-probabilities, their gradient and that of the logits in fp32.
    chunked (`training.loss`): the fp32 gradient of the head, the hidden states and their gradient, and beside them
    either a chunk's logits, fp32 log-probabilities, the copy those are made of and the gradient of the chunk before, or
    a chunk's share of the head's gradient, or, in the backward pass, both gradients times the loss scale.

    Args:
        shape: The architecture.
        passes: The micro-batch, and what is done with it.
        chunk_tokens: Tokens whose logits exist at once under the chunked loss.
    """
    vocabulary, hidden, element = shape.vocab_size, shape.hidden_size, passes.element
    if passes.loss == "plain":
        return passes.tokens * vocabulary * 12
    copied = 4 if element == 2 else 0
    chunk, head = min(passes.tokens, chunk_tokens) * vocabulary, vocabulary * hidden
    before = chunk * element if passes.tokens > chunk_tokens else 0
    hidden_states = passes.tokens * hidden * element
    beside = max(
        before + chunk * (element + 4 + copied),
        chunk * element + head * element,
        head * (4 + (element if copied else 0)),
    )
    return 4 * head + 2 * hidden_states + beside
