import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from inheritune_ds.errors import SurgeryError
from inheritune_ds.surgery import verify
from inheritune_ds.surgery.load import load_model
from inheritune_ds.surgery.verify import probe_tokens
from tests.surgery import tiny
from tests.surgery.tiny import PATHS, Build, SaveReference, block_output, plain


def bypass(block: nn.Module) -> None:
    """Make a block return its input hidden state."""
    original = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        output = original(*args, **kwargs)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    block.forward = forward


@pytest.mark.parametrize("family", sorted(set(PATHS) - {"gpt2"}))
@pytest.mark.parametrize("kept", [(1, 2), (0, 3), (2,)])
def test_target_computes_what_the_reference_does_with_its_other_blocks_bypassed(
    family: str, kept: tuple[int, ...], reference_folder: SaveReference, build: Build
) -> None:
    folder = reference_folder(family)
    built = build(folder, select=",".join(map(str, kept)))
    reference, target = plain(folder), plain(built.folder)
    for block in range(4):
        if block not in kept:
            bypass(reference.get_submodule(f"{PATHS[family]}.{block}"))
    expected = block_output(reference, f"{PATHS[family]}.{kept[-1]}")
    assert torch.equal(block_output(target, f"{PATHS[family]}.{len(kept) - 1}"), expected)
    assert built.report["proof"]["hidden_state"] == "equal, bit for bit"


def test_report_has_the_hash_of_the_hidden_state(folder: Path, build: Build) -> None:
    found = build(folder, select="first:2").report["proof"]
    reference = plain(folder)
    caught: list[torch.Tensor] = []
    reference.get_submodule("model.layers.1").register_forward_hook(lambda *hook: caught.append(hook[2]))
    tokens = probe_tokens(reference.config)
    with torch.no_grad():
        reference(input_ids=tokens, use_cache=False)
    assert found["hidden_state_sha256"] == hashlib.sha256(caught[0].numpy().tobytes()).hexdigest()
    assert (found["probe_tokens"], found["dtype"]) == (32, "float32")
    assert (found["missing"], found["unexpected"]) == (0, 0)


@pytest.mark.parametrize(("positions", "count"), [(512, 32), (7, 7), (None, 32), (-1, 32), (0, 32)])
def test_probe_tokens_are_spread_over_the_vocabulary(positions: int | None, count: int) -> None:
    config: Any = SimpleNamespace(vocab_size=50_000, max_position_embeddings=positions)
    tokens = probe_tokens(config)
    assert tokens.shape == (1, count)
    assert len(set(tokens[0].tolist())) == count
    assert tokens.min() >= 0
    assert tokens.max() < 50_000
    assert tokens.max() - tokens.min() > 25_000
    assert torch.equal(tokens, probe_tokens(config))


def test_weights_that_overflow_are_refused(folder: Path, build: Build, tmp_path: Path) -> None:

    def grow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.down_proj.weight"].fill_(3e38)

    tiny.edit_weights(folder, grow)
    with pytest.raises(SurgeryError) as caught:
        build(folder, select="first:2")
    assert caught.value.problem == "the kept blocks of the reference give a hidden state that is not finite"
    assert caught.value.action.startswith("copy or download the weights again")
    assert not (tmp_path / "target").exists()
    build(folder, select="last:2")  # without the damaged block


def test_a_failed_forward_pass_is_reported(folder: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("needs pixel_values\nand more")

    honest = load_model

    def load(where: Path, **options: Any) -> PreTrainedModel:
        model = honest(where, **options)
        model.forward = fail
        return model

    monkeypatch.setattr(verify, "load_model", load)
    with pytest.raises(SurgeryError) as caught:
        build(folder, select="first:2")
    assert caught.value.problem == (
        "a llama model cannot be proven: its forward pass on 32 token ids fails: needs pixel_values"
    )
    assert caught.value.allowed == "a causal language model that takes input_ids alone"


def test_a_model_that_does_not_call_its_blocks_cannot_be_proven(
    folder: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = verify._forward

    def forward(model: PreTrainedModel, tokens: torch.Tensor) -> None:
        if model.config.num_hidden_layers == 2:  # the target's pass runs
            honest(model, tokens)

    monkeypatch.setattr(verify, "_forward", forward)
    with pytest.raises(SurgeryError) as caught:
        build(folder, select="first:2")
    assert caught.value.problem == ("a llama model cannot be proven: its forward pass does not call its blocks")
