"""The first launch writes the identity of a run; a later launch that differs is refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from inheritune_ds.config.corpus import Corpus
from inheritune_ds.config.kernels import KernelRequest
from inheritune_ds.config.loading import load_recipe
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.data.tokens.prepare import prepare
from inheritune_ds.data.tokens.token_set import TokenSet, find_damage
from inheritune_ds.data.tokens.tokenizer import train_tokenizer
from inheritune_ds.errors import CheckpointError, RunFolderError
from inheritune_ds.run import identity
from inheritune_ds.training.kernels import Kernels
from tests.conftest import Logged
from tests.data.prepared import files_source, make_texts, recipe_file, write_jsonl

TAKEN = Kernels("sdpa", "torch_fused", liger=False, loss="chunked", compile=True, activation_checkpointing="none")
ACTION = "\n  do: restore the old data and settings, or give this run another name: name=OTHER"


class Run:
    def __init__(self, folder: Path, tokenizer: str) -> None:
        self.folder, self._tokenizer = folder, tokenizer
        self.folder.joinpath("run").mkdir()

    def prepare(self, first: list[str], second: list[str], *overrides: str) -> tuple[Recipe, TokenSet]:
        sources: list[Any] = [
            files_source(write_jsonl(self.folder / f"{name}.jsonl", texts), name=name, weight=weight)
            for name, texts, weight in (("books", first, 0.75), ("web", second, 0.25))
        ]
        path = recipe_file(self.folder, Corpus(sources=sources, validation_ratio=0.2), self._tokenizer)
        recipe = load_recipe(str(path), overrides)
        return recipe, prepare(recipe.corpus, self._tokenizer, self.folder / "cache")

    def launch(self, recipe: Recipe, tokens: TokenSet, *, has_checkpoints: bool) -> None:
        """Compare with the last launch, as every launch does."""
        checkpoint = self.folder / "run" / "checkpoints" / "step-00000010"
        if has_checkpoints:
            checkpoint.mkdir(parents=True, exist_ok=True)
        elif checkpoint.exists():
            checkpoint.rmdir()
        assert identity.find_new_damage(self.folder / "run", tokens) is None
        identity.keep_data(self.folder / "run", recipe, tokens)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    train_tokenizer(make_texts(50), 300).save_pretrained(tmp_path / "bpe")
    return Run(tmp_path, str(tmp_path / "bpe"))


def refusal(run: Run, recipe: Recipe, tokens: TokenSet) -> list[str]:
    with pytest.raises(RunFolderError) as caught:
        run.launch(recipe, tokens, has_checkpoints=True)
    head, *lines = caught.value.problem.splitlines()
    assert head == f"{run.folder / 'run'} holds checkpoints that were made from other data; it differs in"
    assert str(caught.value).endswith(ACTION)
    return [line.strip() for line in lines]


def test_unchanged_data_is_accepted(run: Run) -> None:
    recipe, tokens = run.prepare(make_texts(40), make_texts(40, seed=2))
    run.launch(recipe, tokens, has_checkpoints=False)
    written = json.loads((run.folder / "run" / "data.json").read_text())
    assert set(written) == {"fingerprint", "identity", "verified"}
    assert len(written["fingerprint"]) == 64
    assert written["identity"]["tokens"] == tokens.fingerprint
    before = (run.folder / "run" / "data.json").stat().st_mtime_ns
    run.launch(recipe, tokens, has_checkpoints=True)
    assert (run.folder / "run" / "data.json").stat().st_mtime_ns == before


def test_changed_file_is_refused_with_its_hashes_once_there_are_checkpoints(run: Run) -> None:
    texts, others = make_texts(40), make_texts(40, seed=2)
    recipe, tokens = run.prepare(texts, others)
    run.launch(recipe, tokens, has_checkpoints=False)
    old = tokens.manifest["sources"][1]["identity"]["files"][0]["sha256"]
    recipe, tokens = run.prepare(texts, [*others[:-1], "another text"])
    new = tokens.manifest["sources"][1]["identity"]["files"][0]["sha256"]
    lines = refusal(run, recipe, tokens)
    assert f"sources.web.files.web.jsonl.sha256: '{old}' -> '{new}'" in lines
    assert not any("books" in line for line in lines)
    run.launch(recipe, tokens, has_checkpoints=False)  # nothing was trained on the old ones
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
def test_changed_settings_of_the_stream_are_refused(run: Run, override: str, expected: str) -> None:
    texts = make_texts(40), make_texts(40, seed=2)
    run.launch(*run.prepare(*texts), has_checkpoints=False)
    assert expected in refusal(run, *run.prepare(*texts, override))


def test_changed_weight_is_refused_with_unchanged_tokens(run: Run) -> None:
    texts = make_texts(40), make_texts(40, seed=2)
    recipe, tokens = run.prepare(*texts)
    run.launch(recipe, tokens, has_checkpoints=False)
    web = recipe.corpus.sources[1].model_copy(update={"weight": 0.5})
    changed = recipe.model_copy(
        update={"corpus": recipe.corpus.model_copy(update={"sources": [recipe.corpus.sources[0], web]})}
    )
    assert refusal(run, changed, tokens) == ["stream.weights: [0.75, 0.25] -> [0.75, 0.5]"]


def test_files_are_hashed_before_first_use_and_after_a_touch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, tokens = run.prepare(make_texts(40), make_texts(40, seed=2))
    hashed: list[TokenSet] = []

    def watched(found: TokenSet) -> str | None:
        hashed.append(found)
        return find_damage(found)

    monkeypatch.setattr(identity, "find_damage", watched)
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
    damage = identity.find_new_damage(run.folder / "run", tokens)
    assert damage is not None
    assert damage.startswith("books/train-00000.bin has sha256 ")


def begun(folder: Path) -> Path:
    identity.keep_kernels(folder, TAKEN.as_dict())
    checkpoint = folder / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    return folder


def test_checkpoints_fix_auto_to_the_kernels_of_the_first_launch(tmp_path: Path) -> None:
    assert identity.kept_kernels(tmp_path, KernelRequest()) == KernelRequest()
    identity.keep_kernels(tmp_path, TAKEN.as_dict())
    assert identity.kept_kernels(tmp_path, KernelRequest()) == KernelRequest()
    assert identity.kept_kernels(begun(tmp_path), KernelRequest()) == KernelRequest(**TAKEN.as_dict())


def test_named_kernel_replaces_a_kept_one(tmp_path: Path, logged: Logged) -> None:
    named = KernelRequest(attention="eager", compile=False, loss="chunked", deterministic=True)
    kept = identity.kept_kernels(begun(tmp_path), named)
    assert (kept.attention, kept.compile, kept.loss) == ("eager", False, "chunked")
    rounds = "later steps round differently from an uninterrupted run"
    assert logged() == [
        f"WARNING: kernels.attention is eager, and was sdpa before: {rounds}",
        f"WARNING: kernels.compile is False, and was True before: {rounds}",
        f"WARNING: kernels.deterministic is True, and was False before: {rounds}",
    ]


def test_optimizer_that_differs_from_the_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError) as caught:
        identity.kept_kernels(begun(tmp_path), KernelRequest(optimizer="apex"))
    assert caught.value.problem == (
        f"{tmp_path} holds checkpoints with the state of another optimizer; it differs in\n"
        "    kernels.optimizer: 'torch_fused' -> 'apex'"
    )
    assert caught.value.action.startswith('write "optimizer": "auto" or "torch_fused" under kernels, or ')


def test_offloaded_optimizer_becomes_auto(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    identity.keep_kernels(folder, {**TAKEN.as_dict(), "optimizer": "deepspeed_cpu"})
    assert identity.kept_kernels(folder, KernelRequest()).optimizer == "auto"


def test_changed_target_is_refused_once_there_are_checkpoints(tmp_path: Path) -> None:
    before: dict[str, Any] = {"tokens": "1" * 64, "reference": {"weights_sha256": {"model.safetensors": "2"}}}
    changed = {**before, "reference": {"weights_sha256": {"model.safetensors": "3"}}}
    identity.check_target(tmp_path, before, changed)  # nothing was trained yet: the target is rebuilt
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    identity.check_target(tmp_path, before, before)
    identity.check_target(tmp_path, None, changed)
    with pytest.raises(RunFolderError) as caught:
        identity.check_target(tmp_path, before, changed)
    assert "holds checkpoints that were made from another target" in caught.value.problem
    assert "reference.weights_sha256.model.safetensors: '2' -> '3'" in caught.value.problem


def test_kept_micro_batch_is_used_with_checkpoints_if_it_divides(tmp_path: Path) -> None:
    assert identity.kept_micro_batch(tmp_path, 8) == 0
    identity.keep_micro_batch(tmp_path, 4, 1.5)
    assert identity.kept_micro_batch(tmp_path, 8) == 0
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    assert identity.kept_micro_batch(tmp_path, 8) == 4
    assert identity.kept_micro_batch(tmp_path, 6) == 0


OVERRIDES = ["target.select=first:2", "corpus.tokenizer=null"]


def moved_recipe(**places: str) -> Recipe:
    """A recipe with a local reference and local files."""
    model, text = places.get("model", "./old/model"), places.get("text", "old/a.jsonl")
    sources = f"corpus.sources=[{{kind: files, paths: [{text}], name: a}}]"
    others = [places["more"]] if "more" in places else []
    return load_recipe("quickstart", [f"reference={{model: {model}}}", *OVERRIDES, sources, *others])


@pytest.mark.parametrize(
    "places",
    [
        {"text": "/mnt/new/a.jsonl"},
        {"model": "/mnt/new/model"},
        {"text": "new/*.jsonl", "model": "someone/model"},
        {"more": "corpus.tokenizer=/mnt/new/tokenizer"},
    ],
)
def test_moved_data_and_models_are_the_same_recipe(tmp_path: Path, places: dict[str, str], logged: Logged) -> None:
    before, now = moved_recipe(), moved_recipe(**places)
    assert identity.check_recipe(tmp_path, before, now)
    lines = logged()
    assert lines
    assert all(line.startswith("moved: ") for line in lines)
    assert json.loads((tmp_path / "moved.json").read_text()) == [before.fingerprint]
    checkpoint = tmp_path / "checkpoints" / "step-00000010"
    identity.check_checkpoint(tmp_path, checkpoint, {"recipe": before.fingerprint, "data": None}, now)
    identity.check_checkpoint(tmp_path, checkpoint, {"recipe": now.fingerprint, "data": None}, now)
    with pytest.raises(CheckpointError, match="another run"):
        identity.check_checkpoint(tmp_path, checkpoint, {"recipe": "0" * 64, "data": None}, now)
    assert not identity.check_recipe(tmp_path, now, now)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("seed=3", "seed: 1337 -> 3"),
        ("target.select=first:3", "target.select: 'first:2' -> 'first:3'"),
        ("optimizer.lr=5e-5", "optimizer.lr"),
    ],
)
def test_moved_data_with_another_setting_is_refused(tmp_path: Path, change: str, line: str) -> None:
    with pytest.raises(RunFolderError) as caught:
        identity.check_recipe(tmp_path, moved_recipe(), moved_recipe(text="new/a.jsonl", more=change))
    assert line in caught.value.problem
    assert "paths" not in caught.value.problem
    assert not (tmp_path / "moved.json").exists()


def test_another_reference_is_refused_where_no_weight_is_inherited(tmp_path: Path) -> None:
    nothing = "target.inherit=none"
    with pytest.raises(RunFolderError, match=r"reference\.model"):
        identity.check_recipe(tmp_path, moved_recipe(more=nothing), moved_recipe(model="/other", more=nothing))
