"""Bytes that the forward pass saves for the backward pass, and bytes of the logits and the loss.

Counted on the modules of transformers 5.23 (sdpa or flash attention, dropout 0, not compiled, no Liger kernels; those
save less) with `torch.autograd.graph.saved_tensors_hooks`; tests/plan/test_activations.py repeats the count. Heads are
padded to a multiple of 8 (`training.padded_attention`; flash attention does so itself). Eager attention also saves all
scores. `element` is the bytes of one number of the passes: 2 for half precision, 4 for fp32.
"""

from dataclasses import dataclass

from inheritune_ds.config.model import Shape
from inheritune_ds.config.zero import Loss, Recomputation


@dataclass(frozen=True)
class Passes:
    """A rank's forward and backward pass of one micro-batch; `tokens` is its size.

    `masked`: attention takes a mask of all pairs of a window's tokens, and with it a key and a value for every query
    head.
    """

    tokens: int
    seq_len: int
    element: int
    recomputation: Recomputation
    loss: Loss
    masked: bool = False


def mlp_size(shape: Shape) -> int:
    """Units of the MLP."""
    return shape.intermediate_size or 4 * shape.hidden_size


def key_value_size(shape: Shape) -> int:
    """Width of the keys of a token; its values have the same."""
    heads = shape.num_attention_heads
    return shape.hidden_size // heads * (shape.num_key_value_heads or heads)


def activation_bytes(shape: Shape, num_blocks: int, passes: Passes) -> int:
    """Bytes saved at the end of the forward pass, without logits and loss."""
    element = passes.element
    # A rotary model also saves one table of sines and one of cosines for all blocks.
    rotary = 2 * element * shape.hidden_size // shape.num_attention_heads if shape.model_type == "llama" else 0
    kept = _block(shape, passes) if passes.recomputation == "none" else element * shape.hidden_size
    kept += _matmul_outputs(shape, element) if passes.recomputation == "selective" else 0
    mask = passes.seq_len * element if passes.masked else 0
    return passes.tokens * (num_blocks * kept + _edges(shape, element, passes.loss) + mask) + rotary * passes.seq_len


def working_bytes(shape: Shape, passes: Passes) -> int:
    """Additional bytes during the backward pass of one block.

    These are recomputed activations, and intermediate results and gradients, from counts of live tensors
    (`python -m benchmarks.memory`).
    """
    wide = 2 if shape.model_type == "gpt2" else 1
    intermediate = passes.element * (wide * mlp_size(shape) + shape.hidden_size)
    if passes.recomputation == "none":
        return passes.tokens * intermediate
    kept = _matmul_outputs(shape, passes.element) if passes.recomputation == "selective" else 0
    return passes.tokens * (max(_block(shape, passes) - kept, 0) + intermediate)


def _block(shape: Shape, passes: Passes) -> int:
    """Bytes per token that one block saves.

    llama, each RMSNorm: its input upcast to fp32 (the input itself when it is fp32), 1/rms (fp32), the normalized
    input; its output. Attention: rotated q and k, v, the output, the log-sum-exp (fp32, per head). MLP: gate,
    silu(gate), up, their product.
    gpt2, each LayerNorm: its input, mean and 1/std, its output. Attention: q, k, v in one tensor, the output, the
    log-sum-exp. MLP: five tensors of the MLP's width, as `gelu_new` consists of elementary operations.
    If heads are padded, q, k, v and the output are, and the output without padding is saved, too.
    """
    element, hidden, mlp, log_sum_exp = (
        passes.element,
        shape.hidden_size,
        mlp_size(shape),
        4 * shape.num_attention_heads,
    )
    queries = _padded(shape, hidden)
    keys = queries if passes.masked else _padded(shape, key_value_size(shape))
    attention = element * (2 * queries + 2 * keys + (hidden if queries > hidden else 0)) + log_sum_exp
    if shape.model_type == "gpt2":
        return 2 * (2 * element * hidden + 8) + attention + 5 * element * mlp
    return 2 * (4 * hidden + 4 + 2 * element * hidden) + attention + 4 * element * mlp


def _padded(shape: Shape, width: int) -> int:
    """Width of heads of `width` units together when each is padded to a multiple of 8."""
    head = shape.hidden_size // shape.num_attention_heads
    return width // head * -(-head // 8) * 8


def _matmul_outputs(shape: Shape, element: int) -> int:
    """Bytes per token of the outputs of a block's matrix products and of its attention."""
    hidden, mlp = shape.hidden_size, mlp_size(shape)
    inner = mlp if shape.model_type == "gpt2" else 2 * mlp
    projections = hidden + 2 * key_value_size(shape) + hidden + inner + hidden
    return element * (projections + _padded(shape, hidden)) + 4 * shape.num_attention_heads


def _edges(shape: Shape, element: int, loss: Loss) -> int:
    """Bytes per token outside the blocks: final norm, the head's input, token ids and targets (int64)."""
    head_input = element * shape.hidden_size if loss == "plain" else 0
    if shape.model_type == "gpt2":
        return element * shape.hidden_size + 8 + head_input + 16
    return 4 * shape.hidden_size + 4 + element * shape.hidden_size + head_input + 16


def loss_bytes(shape: Shape, passes: Passes, *, chunk_tokens: int) -> int:
    """Peak bytes of logits, loss and their gradients.

    plain, in the backward pass: the fp32 log-probabilities, their gradient and that of the logits in fp32.
    chunked (`training.loss`): the fp32 gradient of the head, the hidden states and their gradient, and either a
    chunk's logits, fp32 log-probabilities, their upcast input and the gradient of the previous chunk, or a chunk's
    share of the head's gradient, or, in the backward pass, both gradients times the loss scale.
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
