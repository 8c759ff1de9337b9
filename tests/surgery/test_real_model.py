"""A real trained model cut: stories260K, five blocks, first three kept. `pytest -s` shows the text before and after."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from inheritune_ds import cli
from inheritune_ds.data.vocabulary import load_tokenizer
from tests.end_to_end.launching import ROOT
from tests.end_to_end.llama2c import convert_model, convert_tokenizer

WEIGHTS = ROOT.parent / "shared" / "data" / "weights" / "stories260K"

PROMPT = "Once upon a time"
KNOWN = "there was a little girl named Lily. She loved to play outside in the park."
"""How llama2.c itself goes on, greedily, from that prompt."""
NEW_TOKENS = 60
pytestmark = pytest.mark.skipif(not WEIGHTS.is_dir(), reason=f"the shared data folder {WEIGHTS} is not here")


def greedy(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS)
    return str(tokenizer.decode(made[0], skip_special_tokens=True))


def hidden_states(folder: Path, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, ...]:  # noqa: N803 - shape suffix
    """The embeddings' output and what leaves every block: transformers' own record, the last one before the norm."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    caught: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, output: caught.append(output))
    with torch.no_grad():
        model(input_ids=tokens_BT, use_cache=False)
    return tuple(caught)


def test_inherit_keeps_the_hidden_state_of_a_real_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference, target = tmp_path / "reference", tmp_path / "target"
    reference.mkdir()
    convert_model(WEIGHTS / "stories260K.bin", reference)
    convert_tokenizer(WEIGHTS / "tok512.bin", reference)
    tokenizer = load_tokenizer(str(reference), "main")
    tokens = torch.tensor([tokenizer(f"{PROMPT}, {KNOWN}")["input_ids"]])
    command = ["inherit", "--reference", str(reference), "--select", "first:3", "--output", str(target)]
    assert cli.main(command) == 0
    assert "equal, bit for bit" in capsys.readouterr().out
    before, after = hidden_states(reference, tokens), hidden_states(target, tokens)
    assert (len(before), len(after)) == (5, 3)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(after, before[:3], strict=True))
    assert not torch.equal(before[2], before[3])
    whole, cut = greedy(reference, tokenizer), greedy(target, tokenizer)
    print(f"5 blocks: {whole}\n3 blocks: {cut}")
    assert KNOWN in whole
    assert cut.startswith(PROMPT)
    assert cut != whole
