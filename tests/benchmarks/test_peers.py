from pathlib import Path

import pytest

from tests.benchmarks.conftest import Rehearse

MODEL = '''\
"""As much of nanoGPT's model.py as its loop touches."""

import torch
from torch import nn
from torch.nn import functional


class GPTConfig:
    def __init__(self, *, block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias):
        self.vocab_size, self.n_embd = vocab_size, n_embd


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def forward(self, idx, targets):
        logits = self.lm_head(self.wte(idx))
        return logits, functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
'''


@pytest.mark.rehearsal
@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.timeout(300)  # a first start builds DeepSpeed's operators
def test_rehearsal_measures_the_available_peers(rehearse: Rehearse, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL, encoding="utf-8")
    result, output = rehearse("peers", "--shape", "gpt2", "--nanogpt", str(tmp_path))
    (found,) = result["settings"]
    assert list(found["subjects"]) == ["plain", "project_shipped", "hf_trainer", "nanogpt"]
    peers = ("plain", "hf_trainer", "nanogpt")
    assert list(found["ratios"]) == [f"project_shipped over {name}" for name in peers]
    assert all(ratio["verdict"] == "" for ratio in found["ratios"].values())
    assert "deepspeed" in found["subjects"]["hf_trainer"]["versions"]
    notes = " ".join(found["subjects"]["project_shipped"]["notes"])
    assert "kernels.compile: " in notes
    assert "allocator: " in notes
    assert "litgpt: skipped (--litgpt-python L/bin/python includes it)" in output
