"""Activation bytes, held against what autograd keeps of the modules that transformers builds."""

from dataclasses import replace

import pytest
import torch

from inheritune_ds.config.model import Shape
from inheritune_ds.config.zero import Loss, Recomputation
from inheritune_ds.plan.activations import Passes, activation_bytes, loss_bytes, working_bytes
from inheritune_ds.training.block_wrapping import wrap_blocks
from inheritune_ds.training.loss import attach_loss
from inheritune_ds.training.packing import DocumentPacking, WindowInputs
from inheritune_ds.training.padded_attention import pad_heads
from tests.plan.test_memory import build, gpt2, llama

BATCH, SEQ_LEN, BLOCKS = 3, 48, 4
TOKENS = BATCH * SEQ_LEN


def passes(
    element: int, recomputation: Recomputation = "none", loss: Loss = "chunked", *, masked: bool = False
) -> Passes:
    return Passes(TOKENS, SEQ_LEN, element, recomputation, loss, masked)


def kept_bytes(
    shape: Shape, dtype: torch.dtype, recomputation: Recomputation, loss: Loss, *, masked: bool = False
) -> int:
    """Bytes that autograd saves for the backward pass, each storage once, without parameters and token ids."""
    model = build(shape, BLOCKS, dtype)
    inputs = WindowInputs(DocumentPacking(0) if masked else None, "sdpa")
    attach_loss(model, loss, compiled=False)  # type: ignore[arg-type]
    wrap_blocks(model, compiled=False, activation_checkpointing=recomputation)  # type: ignore[arg-type]
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in own:
            kept[pointer] = tensor
        return tensor

    tokens = torch.randint(0, shape.vocab_size, (BATCH, SEQ_LEN + 1))
    given = inputs.with_targets(tokens, torch.device("cpu"))
    with inputs.apart(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scaled, _ = model(**given)
    assert scaled.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("element", [2, 4])
@pytest.mark.parametrize("loss", ["chunked", "plain"])
@pytest.mark.parametrize("shape", [llama(), llama(num_key_value_heads=2), gpt2()])
def test_activations_are_the_bytes_that_transformers_keeps(shape: Shape, loss: Loss, element: int) -> None:
    dtype = torch.float32 if element == 4 else torch.bfloat16
    kept = kept_bytes(shape, dtype, "none", loss)
    if loss == "plain":
        kept -= TOKENS * shape.vocab_size * 4  # the log-probabilities
    else:  # gradients of head and hidden states
        kept -= 4 * shape.vocab_size * shape.hidden_size + element * TOKENS * shape.hidden_size
    assert activation_bytes(shape, BLOCKS, passes(element, loss=loss)) == pytest.approx(kept, rel=6e-3)


@pytest.mark.parametrize("element", [2, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "shape", [llama(hidden_size=80), llama(hidden_size=80, num_key_value_heads=2), gpt2(hidden_size=80)]
)
def test_activations_of_padded_heads_and_masks_are_the_bytes_that_autograd_keeps(
    shape: Shape, element: int, *, masked: bool
) -> None:
    pad_heads()
    dtype = torch.float32 if element == 4 else torch.bfloat16
    kept = kept_bytes(shape, dtype, "none", "chunked", masked=masked)
    kept -= 4 * shape.vocab_size * shape.hidden_size + element * TOKENS * shape.hidden_size
    assert activation_bytes(shape, BLOCKS, passes(element, masked=masked)) == pytest.approx(kept, rel=6e-3)


@pytest.mark.parametrize("shape", [llama(), gpt2()])
def test_activations_under_full_recomputation_are_the_inputs_of_the_blocks(shape: Shape) -> None:
    full = activation_bytes(shape, BLOCKS + 1, passes(2, "full")) - activation_bytes(shape, BLOCKS, passes(2, "full"))
    assert full == TOKENS * shape.hidden_size * 2
    once = working_bytes(shape, passes(2, "full")) - working_bytes(shape, passes(2))
    block = activation_bytes(shape, 2, passes(2)) - activation_bytes(shape, 1, passes(2))
    assert once == block, "one block's activations come back"


def test_selective_recomputation_lies_between() -> None:
    none, selective, full = (
        activation_bytes(llama(), BLOCKS, passes(2, recomputation)) for recomputation in ("none", "selective", "full")
    )
    assert full < selective < none


def test_loss_of_all_logits_takes_12_bytes_each() -> None:
    assert loss_bytes(llama(), passes(2, loss="plain"), chunk_tokens=8) == TOKENS * 512 * 12


def test_loss_in_chunks_does_not_grow_with_the_tokens_but_for_the_hidden_states() -> None:
    shape, long = llama(), replace(passes(2), tokens=10 * TOKENS)
    grown = loss_bytes(shape, long, chunk_tokens=64) - loss_bytes(shape, passes(2), chunk_tokens=64)
    assert grown == 2 * 9 * TOKENS * shape.hidden_size * 2
    head = shape.vocab_size * shape.hidden_size
    assert loss_bytes(shape, passes(2), chunk_tokens=1) >= 4 * head + head * (4 + 2)
