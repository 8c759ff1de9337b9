import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import packing
from benchmarks.packing import EOS, Setting
from tests import tiny

SHAPE = {**tiny.LLAMA, "vocab_size": 61, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 48}
TINY = Setting(SHAPE, 2, "cpu", torch.float32, "sdpa")


def test_tokens_have_the_requested_document_length() -> None:
    many = Setting({**SHAPE, "max_position_embeddings": 4096}, 8, "cpu", torch.float32, "sdpa")
    found = packing.tokens(many, 0, document_tokens=50)
    assert found.shape == (8, 4097)
    assert found.numel() / int((found == EOS).sum()) == pytest.approx(50.0, rel=0.1)
    assert not torch.equal(found, packing.tokens(many, 1, document_tokens=50))


def test_errors_are_rounding_and_reveal_a_missing_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    found = packing.errors(TINY, document_tokens=8)
    assert found["loss"] < 1e-5
    assert found["gradient"] < 1e-5
    monkeypatch.setattr(
        "inheritune_ds.training.packing.positions", lambda tokens, _: torch.arange(tokens.shape[1])[None]
    )
    assert packing.errors(TINY, document_tokens=8)["gradient"] > 1e-3


def test_main_writes_times_and_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packing, "cpu_settings", lambda: {"tiny": TINY})
    monkeypatch.setattr(packing, "TURNS", 3)
    monkeypatch.setattr(sys, "argv", ["packing", "--out", str(tmp_path / "packing.json")])
    packing.main()
    found = json.loads((tmp_path / "packing.json").read_text())["settings"]["tiny"]
    assert found["ratio"]["min"] <= found["ratio"]["median"] <= found["ratio"]["max"]
    assert found["windows"]["median"] > 0.0
    assert (found["peak_gib"], found["compiled_again"]) == ({}, 0)
    assert capsys.readouterr().out.startswith("tiny                 documents / windows ")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's guards
def test_documents_of_other_lengths_do_not_compile_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # graphs without code
    draw = partial(packing.tokens, document_tokens=8)
    monkeypatch.setattr(packing, "tokens", draw)
    counts = {int((draw(TINY, turn)[:, :-1] == EOS).sum()) for turn in range(packing.WARM_UP, packing.TURNS)}
    assert len(counts) > 3
    assert packing.times(replace(TINY, compiled=True))["compiled_again"] == 0
