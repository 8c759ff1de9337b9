"""Real parts: a trained LLaMA (stories260K) cut to three of its five blocks; GPT-2's tokenizer on real books."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from inheritune_ds.data.tokens.tokenizer import load_tokenizer
from tests import tiny
from tests.end_to_end.llama2c import convert_model, convert_tokenizer
from tests.launching import ROOT

SHARED = ROOT.parent / "shared" / "data"
CPU = str(ROOT / "ds_configs" / "cpu.json")
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the shared data folder {SHARED} is not here")


def write_recipe(folder: Path, name: str, **sections: Any) -> None:
    """Write a recipe that validates at its start and end."""
    ends = {"validation": {"interval_steps": 1000, "max_tokens": 4096}, "checkpoint": {"interval_steps": 1000}}
    document = tiny.document(name=name, **ends, **sections)
    (folder / f"{name}.yaml").write_text(json.dumps(document))


@needs_shared
@pytest.mark.timeout(300)
@pytest.mark.parametrize("launched_by", ["test", pytest.param("study", marks=[pytest.mark.thorough, pytest.mark.slow])])
def test_stories_model_of_three_blocks_ends_below_random_init(
    launch: Callable[..., str], tmp_path: Path, record_property: Callable[[str, object], None], launched_by: str
) -> None:
    weights = SHARED / "weights" / "stories260K"
    reference = tmp_path / "stories260K"
    reference.mkdir()
    model = convert_model(weights / "stories260K.bin", reference)
    convert_tokenizer(weights / "tok512.bin", reference)
    tokenizer = load_tokenizer(str(reference), "main")
    start = tokenizer("Once upon a time")["input_ids"]
    ids = list(start)
    for _ in range(20):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert str(tokenizer.decode(ids, skip_special_tokens=True)).startswith(
        "Once upon a time, there was a little girl named Lily."
    ), "the conversion is right: the README of the data has this story"
    text = str(SHARED / "corpora" / "tinystories_sample.txt")
    stories = {"kind": "files", "paths": [text], "document_separator": "\n\n"}
    write_recipe(
        tmp_path,
        name="stories-3l",
        reference={"model": str(reference)},
        target={"select": "first:3"},
        corpus={"sources": [stories], "validation_ratio": 0.15},
        training={"seq_len": 128, "global_batch_tokens": 2048, "duration": "30 steps"},
        optimizer={"lr": 1e-3},
        schedule={"kind": "cosine", "warmup_steps": 5},
    )
    study: dict[str, Any] = {
        "name": "stories",
        "description": "three blocks of a real model against random values",
        "runs": [
            {"recipe": "stories-3l.yaml", "role": "target"},
            {"recipe": "stories-3l.yaml", "role": "baseline", "overrides": ["name=random", "target.inherit=none"]},
        ],
    }
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    if launched_by == "test":  # the study finds its runs finished
        for run in study["runs"]:
            launch("train.py", "--deepspeed_config", CPU, "--recipe", run["recipe"], *run.get("overrides", []))
    output = launch("inheritune_ds/__main__.py", "study", str(tmp_path / "study.yaml"), "--deepspeed_config", CPU)
    report = json.loads((tmp_path / "runs/study-stories/report/report.json").read_text())
    run = tmp_path / "runs" / "stories-3l"
    files = {
        "trained": run / "eval/reference.json",
        "at_start": run / "eval/validation-step-00000000.json",
        "at_end": run / "eval/validation-step-00000030.json",
        "random": tmp_path / "runs/random/eval/validation-step-00000030.json",
    }
    losses = {name: json.loads(path.read_text())["loss"] for name, path in files.items()}
    for name, value in losses.items():
        record_property(name, value)
        assert f"{value:.4f}" in output, name
    assert losses["trained"] < losses["at_start"], "two blocks are missing"
    assert losses["at_end"] < min(losses["at_start"], losses["random"])
    (against_random,) = (entry for entry in report["differences"] if entry["to"] == "random")
    assert against_random["interval"][1] < 0.0
    assert against_random["words"] == "on this text; the spread between seeds is not in it"


@needs_shared
@pytest.mark.timeout(300)
def test_books_with_the_gpt2_tokenizer_train_and_count_their_tokens(launch: Callable[..., str], tmp_path: Path) -> None:
    tokenizer = tmp_path / "gpt2"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_bytes((SHARED / "tokenizers/gpt2/tokenizer.json").read_bytes())
    sizes = {"vocab_size": 50257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape = {"model_type": "gpt2", **sizes, "max_position_embeddings": 256, "tie_word_embeddings": True}
    books = {"kind": "files", "paths": [str(SHARED / "corpora/books/books-0[23]*.jsonl.gz")]}
    write_recipe(
        tmp_path,
        name="books",
        target={"shape": shape},
        corpus={"sources": [books], "tokenizer": str(tokenizer), "validation_ratio": 0.2},
        training={"seq_len": 256, "global_batch_tokens": 2048, "duration": "10 steps"},
        schedule={"kind": "constant", "warmup_steps": 2},
    )
    launch("train.py", "--deepspeed_config", CPU, "--recipe", "books.yaml")
    result = json.loads((tmp_path / "runs/books/run.json").read_text())
    manifest = json.loads(next((tmp_path / "cache/tokens").glob("*/manifest.json")).read_text())
    total = manifest["train_tokens"] + manifest["validation_tokens"]
    assert manifest["token_dtype"] == "uint16"
    # 34.8 MB of text in four files are 8.4M GPT-2 tokens (the data's own README); these two have 15 and 13 books.
    assert 4.0e6 < total < 4.3e6
    assert manifest["train_documents"] + manifest["validation_documents"] == 28
    assert result["corpus_tokens"] == manifest["train_tokens"]
    assert result["unique_tokens"] == result["tokens_seen"] == 20_480
    first = json.loads((tmp_path / "runs/books/eval/validation-step-00000000.json").read_text())
    assert result["val_loss"] < first["loss"] - 0.5
