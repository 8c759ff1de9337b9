"""Windows of several documents: losses and gradients are those of every document alone, and nothing crosses.

Shapes: B windows, T tokens each, N = B * T tokens, H heads, D their width, V vocabulary.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from inheritune_ds.errors import RecipeError
from inheritune_ds.training.block_wrapping import ActivationCheckpointing, wrap_blocks
from inheritune_ds.training.document_masks import documents_apart, skip_packing_check
from inheritune_ds.training.loss import IGNORED, LossKind, attach_loss
from inheritune_ds.training.packing import (
    DocumentPacking,
    WindowInputs,
    counted_targets,
    document_starts,
    losses_by_window,
    positions,
    prove_apart,
)

EOS, VOCABULARY, SEQ_LEN = 3, 61, 24
PACKING = DocumentPacking(EOS)
CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
WIDE = {**SIZES, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**WIDE, "num_key_value_heads": 2},
    "gpt2": {**SIZES, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32, **dict.fromkeys(
        ("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)},
    # full attention and a window of 4 tokens in turn
    "gemma3_text": {**WIDE, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "layer_types": [
        "full_attention", "sliding_attention", "sliding_attention"]},
    "gpt_neox": WIDE,
}  # fmt: skip


def build(family: str, attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    """A model with weights so large that attention matters."""
    torch.manual_seed(2)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def windows() -> torch.Tensor:
    """(3, T + 1): documents of all lengths from 1 on, cut at both ends, and one window without an end."""
    tokens = torch.randint(4, VOCABULARY, (3, SEQ_LEN + 1), generator=torch.Generator().manual_seed(5))
    tokens[0, [0, 4, 5, 13]] = EOS
    tokens[1, [11, SEQ_LEN - 1, SEQ_LEN]] = EOS
    return tokens


def pieces(row_T1: torch.Tensor) -> list[torch.Tensor]:
    """The documents of a window of inputs, each with the targets that are in it."""
    found, begun = [], 0
    for place in range(1, len(row_T1) + 1):
        if place == len(row_T1) or int(row_T1[place - 1]) == EOS:
            found.append(row_T1[begun:place])
            begun = place
    return [piece for piece in found if len(piece) > 1]


def gradient(model: PreTrainedModel) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def unpacked(model: PreTrainedModel) -> tuple[list[float], torch.Tensor]:
    """Mean loss of every window and gradient of the sum, every document by itself, with transformers' own forward."""
    means = []
    for row in windows():
        losses = [
            functional.cross_entropy(
                model(input_ids=piece[None, :-1], use_cache=False).logits[0], piece[1:], reduction="sum"
            )
            for piece in pieces(row)
        ]
        total = torch.stack(losses).sum()
        total.backward()  # type: ignore[no-untyped-call]
        means.append(float(total.detach()) / sum(len(piece) - 1 for piece in pieces(row)))
    return means, gradient(model)


def packed(model: PreTrainedModel, attention: str = "sdpa") -> tuple[list[float], torch.Tensor]:
    """The same for all windows at once, like the engine."""
    inputs = WindowInputs(PACKING, attention)
    with inputs.apart():
        given = inputs.with_targets(windows(), CPU)
        model(**given)[0].backward()
        with torch.no_grad():
            losses = losses_by_window(model(**given), windows())
    means = losses.sum(axis=1) / counted_targets(windows(), PACKING).sum(dim=1).numpy()
    return means.tolist(), gradient(model)


def assert_equal(found: tuple[list[float], torch.Tensor], wanted: tuple[list[float], torch.Tensor]) -> None:
    assert found[0] == pytest.approx(wanted[0], abs=1e-5)
    assert float((found[1] - wanted[1]).norm() / wanted[1].norm()) < 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_every_document_alone(family: str, attention: str) -> None:
    model = build(family, attention)
    wanted = unpacked(model)
    attach_loss(model, "chunked", compiled=False)
    assert_equal(packed(model, attention), wanted)


def test_padded_heads_keep_documents_apart() -> None:
    model = build("llama", hidden_size=40)  # 10 a head
    wanted = unpacked(model)
    attach_loss(model, "chunked", compiled=False)
    assert_equal(packed(model), wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["chunked", "plain"])
@pytest.mark.parametrize("kept", ["selective", "full"])
def test_recomputation_and_either_loss_change_nothing(
    family: str, kind: LossKind, kept: ActivationCheckpointing
) -> None:
    model = build(family)
    wanted = unpacked(model)
    attach_loss(model, kind, compiled=False)
    wrap_blocks(model, compiled=False, activation_checkpointing=kept)
    assert_equal(packed(model), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_token_reaches_another_document(family: str) -> None:
    model, inputs = build(family).eval(), WindowInputs(PACKING, "sdpa")
    tokens = windows()[:, :-1]
    with torch.no_grad(), inputs.apart():
        before = model(**inputs.inputs(tokens, CPU)).logits
        reached = torch.zeros(3, SEQ_LEN, SEQ_LEN, dtype=torch.bool)
        for place in range(SEQ_LEN):
            others = tokens.clone()
            others[:, place] = torch.where(tokens[:, place] == EOS, EOS, 4 + tokens[:, place] % 50)
            reached[:, place] = (model(**inputs.inputs(others, CPU)).logits != before).any(dim=-1)
    document = document_starts(tokens, EOS).cumsum(1)
    same = document[:, :, None] == document[:, None, :]
    assert not (reached & ~same).any()
    changed = tokens != EOS
    assert reached.diagonal(dim1=1, dim2=2)[changed].all(), "or nothing was changed"
    within = (same & torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).triu(1))[changed]
    assert reached[changed][within].float().mean() > 0.4, "a document attends to itself"


def test_without_packing_a_token_does_reach_the_next_document() -> None:
    model, inputs = build("llama").eval(), WindowInputs(None, "sdpa")
    tokens = windows()[:, :-1]
    others = tokens.clone()
    others[0, 1] += 1
    with torch.no_grad(), inputs.apart():
        assert set(inputs.inputs(tokens, CPU)) == {"input_ids", "use_cache"}
        logits = [model(**inputs.inputs(given, CPU)).logits[0, -1] for given in (tokens, others)]
    assert not torch.equal(*logits)


def test_positions_and_starts_restart_after_every_end() -> None:
    tokens = torch.tensor([[7, 8, EOS, 9, EOS, EOS, 5, 6], [EOS, 1, 1, 1, 1, 1, 1, EOS], [-100] * 8])
    assert positions(tokens, EOS).tolist() == [
        [0, 1, 2, 0, 1, 0, 0, 1],
        [0, 0, 1, 2, 3, 4, 5, 6],
        [0, 1, 2, 3, 4, 5, 6, 7],
    ]
    assert document_starts(tokens, EOS)[0].tolist() == [True, False, False, True, False, True, True, False]


def test_first_token_of_a_document_and_padding_are_not_counted() -> None:
    tokens = torch.tensor([[7, 8, EOS, 9, 9], [1, EOS, -100, -100, -100]])
    assert counted_targets(tokens, PACKING).tolist() == [[True, True, False, True], [True, False, False, False]]
    assert counted_targets(tokens, None).tolist() == [[True] * 4, [True, False, False, False]]
    given = WindowInputs(PACKING, "sdpa").with_targets(tokens, CPU)
    assert given["targets"].tolist() == [[8, EOS, IGNORED, 9], [EOS, IGNORED, IGNORED, IGNORED]]
    assert given["input_ids"].tolist() == [[7, 8, EOS, 9], [1, EOS, 0, 0]]


def test_losses_by_window_have_a_row_for_each_window() -> None:
    tokens, losses = torch.zeros(2, 5), torch.tensor([[1.0, 2.0, 0.0, 3.0], [0.5, 0.0, 0.0, 0.0]])
    for given in (losses, losses.view(1, -1), losses.bfloat16()):
        found = losses_by_window(given, tokens)
        assert found.dtype == np.float32
        assert found.tolist() == losses.tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_mask_is_kept_once_for_all_blocks(family: str) -> None:
    # Beside a mask SDPA repeats keys and values that heads share.
    changes: dict[str, Any] = {"num_key_value_heads": 4} if family == "llama" else {}
    kept: dict[bool, int] = {}
    for packed_too in (False, True):
        model, inputs = build(family, **changes), WindowInputs(PACKING if packed_too else None, "sdpa")
        attach_loss(model, "chunked", compiled=False)
        storages: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor, into: dict[int, torch.Tensor] = storages) -> torch.Tensor:
            into[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with inputs.apart(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(**inputs.with_targets(windows(), CPU))
        kept[packed_too] = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    mask = 3 * SEQ_LEN * SEQ_LEN * 4
    # sines and cosines, or the position ids, of every window in place of one
    positions_too = 2 * SEQ_LEN * (2 * 8 * 4 if family == "llama" else 8)
    assert kept[True] - kept[False] == mask + positions_too


def test_masks_are_transformers_own_again_afterwards() -> None:
    from transformers import masking_utils

    skip_packing_check()
    config, embedded = build("llama").config, torch.zeros(1, 4, 32)
    restarting = torch.tensor([[0, 1, 0, 1]])

    def mask() -> Any:
        return masking_utils.create_causal_mask(config, embedded, None, None, position_ids=restarting)

    assert mask() is None
    with documents_apart():
        found = mask()
    low = torch.finfo(torch.float32).min
    assert found[0, 0].tolist() == [[0, low, low, low], [0, 0, low, low], [low, low, 0, low], [low, low, 0, 0]]
    assert mask() is None


# The proof at the start


def prove(model: PreTrainedModel, attention: str, dtype: torch.dtype = torch.float32) -> None:
    inputs = WindowInputs(PACKING, attention)
    prove_apart(inputs, lambda given: model(**given).logits.float(), model.config, CPU, dtype)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_proof_accepts_a_model_that_keeps_documents_apart(family: str, attention: str, dtype: torch.dtype) -> None:
    model = build(family, attention).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    prove(model, attention, dtype)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    # its masks do not look at the positions
    "opt": ({**WIDE, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 32},
            "a token changes the logits of the document behind its own"),
    # no attention at all: a state goes from token to token
    "mamba": ({**SIZES, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 2},
              "a token changes the logits of the document behind its own"),
}  # fmt: skip


@pytest.mark.parametrize("family", REFUSED)
def test_model_that_mixes_documents_is_refused(family: str) -> None:
    sizes, found = REFUSED[family]
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    with pytest.raises(RecipeError) as caught:
        prove(model, "sdpa")
    assert caught.value.problem == (
        f"training.packing is documents, but a {family} model with sdpa attention does not keep them apart: {found}"
    )
    assert caught.value.allowed.endswith("by restarting position ids, such as llama or gpt2")
    assert caught.value.action.startswith("write training.packing: windows")


def test_document_that_differs_from_itself_alone_is_refused() -> None:
    model = build("gpt2").eval()

    def without_positions(given: dict[str, Any]) -> torch.Tensor:
        tokens = given["input_ids"]
        document = document_starts(tokens, EOS).cumsum(1)
        seen = (document[:, :, None] == document[:, None, :]).tril()[:, None]
        return model(input_ids=tokens, attention_mask=seen).logits  # type: ignore[no-any-return]

    with pytest.raises(RecipeError, match=r"one of 7 tokens has other logits than alone \(relative error [\d.]+\)"):
        prove_apart(WindowInputs(PACKING, "sdpa"), without_positions, model.config, CPU, torch.bfloat16)


# Flash attention: boundaries in the row of all windows


def test_boundaries_are_those_of_documents_and_windows_and_end_with_empty_ones() -> None:
    tokens = torch.tensor([[7, EOS, 9, 9], [EOS, EOS, 5, EOS]])
    inputs = WindowInputs(PACKING, "flash_attention_2")
    assert inputs.boundaries(tokens).tolist() == [0, 2, 4, 5, 6, 8, 8, 8, 8]
    many = torch.full((2, 256), 9)
    assert inputs.boundaries(many).tolist() == [0, 256] + [512] * 9
    assert inputs.boundaries(many).dtype == torch.int32


def test_room_for_boundaries_is_the_same_for_most_batches_and_stays_after_growing() -> None:
    inputs = WindowInputs(PACKING, "flash_attention_2")
    sparse, dense = torch.full((2, 256), 9), torch.full((2, 256), 9)
    sparse[:, ::128] = EOS
    dense[:, ::16] = EOS
    assert [len(inputs.boundaries(given)) for given in (sparse, dense, sparse)] == [11, 41, 41]
    found = inputs.boundaries(dense).diff()
    assert found[found > 0].tolist() == ([1] + [16] * 15 + [15]) * 2


def varlen(q_NHD: torch.Tensor, k_NHD: torch.Tensor, v_NHD: torch.Tensor, **options: Any) -> torch.Tensor:
    """flash_attn_varlen_func in plain arithmetic."""
    assert options["causal"]
    assert options["cu_seqlens_q"] is options["cu_seqlens_k"]
    assert options["max_seqlen_q"] == options["max_seqlen_k"] == SEQ_LEN
    place = torch.arange(len(q_NHD))
    document = torch.searchsorted(options["cu_seqlens_q"], place, right=True)
    seen = (document[:, None] == document[None, :]) & (place[:, None] >= place[None, :])
    groups = q_NHD.shape[1] // k_NHD.shape[1]
    q, k, v = (given.transpose(0, 1) for given in (q_NHD, k_NHD, v_NHD))
    k, v = (given.repeat_interleave(groups, dim=0) for given in (k, v))
    scores: torch.Tensor = q @ k.mT * (options.get("softmax_scale") or q.shape[-1] ** -0.5)
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_flash_attention_takes_the_documents_boundaries(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import modeling_flash_attention_utils as utils

    def options(**given: Any) -> dict[str, Any]:
        wanted = ("softmax_scale", "max_seqlen_q", "max_seqlen_k")
        return {"causal": given["is_causal"], **{key: given[key] for key in wanted}}

    functions = ((None, varlen, None, None, None), (options, None))
    monkeypatch.setattr(utils, "lazy_import_flash_attention", lambda _: functions)
    model = build(family).double()  # transformers would cast fp32 to half precision
    wanted = unpacked(model)
    attach_loss(model, "chunked", compiled=False)
    model.config._attn_implementation = "flash_attention_2"
    assert_equal(packed(model, "flash_attention_2"), wanted)
