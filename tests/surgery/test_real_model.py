"""A real trained model cut: stories260K, five blocks, first three kept. `pytest -s` shows the text before and after."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from inheritune_ds import cli
from inheritune_ds.data.tokens.tokenizer import load_tokenizer
from tests.end_to_end.llama2c import convert_model, convert_tokenizer
from tests.launching import ROOT

WEIGHTS = ROOT.parent / "shared" / "data" / "weights" / "stories260K"

PROMPT = "Once upon a time"
KNOWN = "there was a little girl named Lily. She loved to play outside in the park."
"""Greedy continuation by llama2.c itself."""
NEW_TOKENS = 60
pytestmark = pytest.mark.skipif(not WEIGHTS.is_dir(), reason=f"the shared data folder {WEIGHTS} is not here")


def greedy(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS)
    return str(tokenizer.decode(made[0], skip_special_tokens=True))


def hidden_states(folder: Path, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, ...]:  # noqa: N803 - shape suffix
    """Output of every block."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    caught: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, output: caught.append(output))
    with torch.no_grad():
        model(input_ids=tokens_BT, use_cache=False)
    return tuple(caught)


def lay_out_like_openllama(folder: Path) -> None:
    """Save one pickle file with a table of angles in every block, as older transformers did."""
    state = load_file(folder / "model.safetensors")
    for block in range(5):
        state[f"model.layers.{block}.self_attn.rotary_emb.inv_freq"] = torch.arange(4) / 8.0
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert not list(folder.glob("tokenizer.json"))


def test_inherit_reads_a_folder_laid_out_like_openllama(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference, plain, pickled = tmp_path / "reference", tmp_path / "plain", tmp_path / "pickled"
    reference.mkdir()
    convert_model(WEIGHTS / "stories260K.bin", reference)
    convert_tokenizer(WEIGHTS / "tok512.bin", reference)
    command = ["inherit", "--reference", str(reference), "--select", "0,2-3", "--output"]
    assert cli.main([*command, str(plain)]) == 0
    assert "pickle" not in capsys.readouterr().out
    lay_out_like_openllama(reference)
    assert cli.main([*command, str(pickled)]) == 0
    printed = capsys.readouterr().out
    assert "reference: pickle files, read with torch.load(mmap=True, weights_only=True)" in printed
    assert "equal, bit for bit" in printed
    before, after = load_file(plain / "model.safetensors"), load_file(pickled / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    report = json.loads((pickled / "inheritance.json").read_text())
    assert len([name for name in report["left_out"] if name.endswith("inv_freq")]) == 5
    assert load_tokenizer(str(pickled))(PROMPT)["input_ids"] == load_tokenizer(str(reference))(PROMPT)["input_ids"]


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
