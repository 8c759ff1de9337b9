from pathlib import Path

import numpy as np

from inheritune_ds.checkpoints.train_state import TrainState
from inheritune_ds.config.corpus import Corpus
from inheritune_ds.config.loading import load_recipe
from inheritune_ds.data.tokens.prepare import prepare
from inheritune_ds.data.tokens.tokenizer import train_tokenizer
from inheritune_ds.run.data import RunData
from tests.data.prepared import files_source, make_texts, recipe_file, write_jsonl


def test_batches_follow_the_weights_of_the_sources(tmp_path: Path) -> None:
    train_tokenizer(make_texts(50), 300).save_pretrained(tmp_path / "bpe")
    sources = [
        files_source(write_jsonl(tmp_path / f"{name}.jsonl", make_texts(200, seed=seed)), name=name, weight=weight)
        for name, seed, weight in (("books", 1, 0.75), ("web", 2, 0.25))
    ]
    path = recipe_file(tmp_path, Corpus(sources=[*sources], validation_ratio=0.2), str(tmp_path / "bpe"))
    recipe = load_recipe(str(path), ["training.global_batch_tokens=64"])
    tokens = prepare(recipe.corpus, str(tmp_path / "bpe"), tmp_path / "cache")
    data = RunData(recipe, tokens)
    (batch,) = data.stream.micro_batches(3, rank=0, world_size=1, micro_batch_size=4)
    assert np.asarray(batch).shape == (4, 17)
    seen = data.by_source(TrainState(8))
    assert {name: figures["tokens_seen"] for name, figures in seen.items()} == {"books": 24 * 16, "web": 8 * 16}
    metrics = data.metrics(TrainState(8))
    assert metrics["data/books/tokens_seen"] == 24 * 16
    assert data.unique_tokens(TrainState(8)) == 32 * 16
