import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inheritune_ds.checkpoints.train_state import TrainState
from inheritune_ds.config.corpus import Corpus
from inheritune_ds.config.loading import load_recipe
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.data.tokens.prepare import prepare
from inheritune_ds.data.tokens.token_set import TokenSet, find_damage
from inheritune_ds.data.tokens.tokenizer import train_tokenizer
from inheritune_ds.errors import RunFolderError
from inheritune_ds.run import data as run_data
from inheritune_ds.run.data import DataRecord, RunData
from tests.data.prepared import files_source, make_texts, recipe_file, write_jsonl

ACTION = "\n  do: bring the old data and settings back, or give this run a name of its own: name=OTHER"


class Run:
    """A run folder with its recipe and tokens; `launch` is what every start of the program does."""

    def __init__(self, folder: Path, tokenizer: str) -> None:
        self.folder, self._tokenizer = folder, tokenizer
        self.folder.joinpath("run").mkdir()

    def prepare(self, first: list[str], second: list[str], *overrides: str) -> tuple[Recipe, TokenSet]:
        """Recipe and tokens of two sources with weights."""
        sources: list[Any] = [
            files_source(write_jsonl(self.folder / f"{name}.jsonl", texts), name=name, weight=weight)
            for name, texts, weight in (("books", first, 0.75), ("web", second, 0.25))
        ]
        path = recipe_file(self.folder, Corpus(sources=sources, validation_ratio=0.2), self._tokenizer)
        recipe = load_recipe(str(path), overrides)
        return recipe, prepare(recipe.corpus, self._tokenizer, self.folder / "cache")

    def launch(self, recipe: Recipe, tokens: TokenSet, *, has_checkpoints: bool) -> None:
        """Compare with the last launch, or write what this one reads."""
        record = DataRecord(self.folder / "run")
        assert record.damage_of(tokens) is None
        record.settle(recipe, tokens, has_checkpoints=has_checkpoints)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    train_tokenizer(make_texts(50), 300).save_pretrained(tmp_path / "bpe")
    return Run(tmp_path, str(tmp_path / "bpe"))


def refusal(run: Run, recipe: Recipe, tokens: TokenSet) -> list[str]:
    """The lines that tell what differs."""
    with pytest.raises(RunFolderError) as caught:
        run.launch(recipe, tokens, has_checkpoints=True)
    head, *lines = caught.value.problem.splitlines()
    assert head == f"{run.folder / 'run'} holds checkpoints that were made from other data; it differs in"
    assert str(caught.value).endswith(ACTION)
    return [line.strip() for line in lines]


def test_the_same_data_goes_on(run: Run) -> None:
    recipe, tokens = run.prepare(make_texts(40), make_texts(40, seed=2))
    run.launch(recipe, tokens, has_checkpoints=False)
    written = json.loads((run.folder / "run" / "data.json").read_text())
    assert set(written) == {"fingerprint", "identity", "verified"}
    assert len(written["fingerprint"]) == 64
    assert written["identity"]["tokens"] == tokens.fingerprint
    before = (run.folder / "run" / "data.json").stat().st_mtime_ns
    run.launch(recipe, tokens, has_checkpoints=True)
    assert (run.folder / "run" / "data.json").stat().st_mtime_ns == before


def test_a_changed_file_is_named_with_its_hashes_once_there_are_checkpoints(run: Run) -> None:
    texts, others = make_texts(40), make_texts(40, seed=2)
    recipe, tokens = run.prepare(texts, others)
    run.launch(recipe, tokens, has_checkpoints=False)
    old = tokens.manifest["sources"][1]["identity"]["files"][0]["sha256"]
    recipe, tokens = run.prepare(texts, [*others[:-1], "another text"])
    new = tokens.manifest["sources"][1]["identity"]["files"][0]["sha256"]
    lines = refusal(run, recipe, tokens)
    assert f"sources.web.files.web.jsonl.sha256: '{old}' -> '{new}'" in lines
    assert not any("books" in line for line in lines)
    run.launch(recipe, tokens, has_checkpoints=False)  # nothing was trained from the old ones
    run.launch(recipe, tokens, has_checkpoints=True)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=7", "stream.seed: 1337 -> 7"),
        ("training.sampling=random", "stream.sampling: 'shuffled' -> 'random'"),
        ("training.packing=documents", "stream.packing: 'windows' -> 'documents'"),
        ("training.global_batch_tokens=32", "stream.global_batch_tokens: 16 -> 32"),
        ("validation.max_tokens=64", "validation_tokens: 4194304 -> 64"),
        ("corpus.validation_ratio=0.3", "corpus.validation_ratio: 0.2 -> 0.3"),
    ],
)
def test_changed_settings_of_the_stream_are_named(run: Run, override: str, expected: str) -> None:
    texts = make_texts(40), make_texts(40, seed=2)
    run.launch(*run.prepare(*texts), has_checkpoints=False)
    assert expected in refusal(run, *run.prepare(*texts, override))


def test_a_changed_weight_is_named_though_the_tokens_are_the_same(run: Run) -> None:
    texts = make_texts(40), make_texts(40, seed=2)
    recipe, tokens = run.prepare(*texts)
    run.launch(recipe, tokens, has_checkpoints=False)
    web = recipe.corpus.sources[1].model_copy(update={"weight": 0.5})
    changed = recipe.model_copy(
        update={"corpus": recipe.corpus.model_copy(update={"sources": [recipe.corpus.sources[0], web]})}
    )
    assert refusal(run, changed, tokens) == ["stream.weights: [0.75, 0.25] -> [0.75, 0.5]"]


def test_files_are_hashed_before_first_use_and_again_when_they_were_touched(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, tokens = run.prepare(make_texts(40), make_texts(40, seed=2))
    hashed: list[TokenSet] = []

    def watched(found: TokenSet) -> str | None:
        hashed.append(found)
        return find_damage(found)

    monkeypatch.setattr(run_data, "find_damage", watched)
    run.launch(recipe, tokens, has_checkpoints=False)
    run.launch(recipe, tokens, has_checkpoints=True)
    assert len(hashed) == 1
    shard = tokens.sources[0].train[0].path
    os.utime(shard)
    run.launch(recipe, tokens, has_checkpoints=True)
    assert len(hashed) == 2
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    damage = DataRecord(run.folder / "run").damage_of(tokens)
    assert damage is not None
    assert damage.startswith("books/train-00000.bin has sha256 ")


def test_the_batches_come_from_the_shards_by_weight(run: Run) -> None:
    recipe, tokens = run.prepare(make_texts(200), make_texts(200, seed=2), "training.global_batch_tokens=64")
    data = RunData(recipe, tokens)
    (batch,) = data.stream.micro_batches(3, rank=0, world_size=1, micro_batch_size=4)
    assert np.asarray(batch).shape == (4, 17)
    seen = data.by_source(TrainState(8))
    assert {name: figures["tokens_seen"] for name, figures in seen.items()} == {"books": 24 * 16, "web": 8 * 16}
    metrics = data.metrics(TrainState(8))
    assert metrics["data/books/tokens_seen"] == 24 * 16
    assert data.unique_tokens(TrainState(8)) == 32 * 16
