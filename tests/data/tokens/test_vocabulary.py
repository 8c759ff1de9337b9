"""Ids that a text can get need a row in the embeddings; others do not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from inheritune_ds.config.loading import load_recipe
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.data.tokens import writer
from inheritune_ds.data.tokens.prepare import prepare
from inheritune_ds.data.tokens.tokenizer import load_tokenizer, train_tokenizer
from inheritune_ds.data.tokens.vocabulary import check_known_rows, check_rows
from inheritune_ds.errors import CorpusError
from tests.data.prepared import TRAINED, corpus_of, files_source, make_texts, write_jsonl


def tokenizer_with(folder: Path, *tokens: AddedToken, **special: str) -> tuple[str, int]:
    """A saved tokenizer with more tokens, and the entries that it had without them."""
    tokenizer: Any = train_tokenizer(make_texts(50), 300)
    rows = len(tokenizer)
    tokenizer.add_tokens([*tokens])
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(folder)
    return str(folder), rows


def recipe_of(folder: Path, rows: int, tokenizer: str | None = None) -> Recipe:
    """A recipe with a local reference in `folder`, whose config says how many rows it has."""
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": rows}))
    overrides = [f"reference={{model: {folder}}}", "target={select: 'first:2'}"]
    return load_recipe("quickstart", [*overrides, f"corpus.tokenizer={tokenizer or 'null'}"])


@pytest.mark.parametrize(
    ("special", "shown"),
    [
        ({"pad_token": "[PAD]"}, "[PAD]"),
        ({"unk_token": "<unused>"}, "<unused>"),
        ({"pad_token": "<p>", "sep_token": "<sep>"}, "<sep>"),
    ],
)
def test_special_tokens_that_are_in_no_text_need_no_row(
    tmp_path: Path, special: dict[str, str], shown: str, logged: Callable[[], list[str]]
) -> None:
    name, rows = tokenizer_with(tmp_path, **special)
    check_rows(load_tokenizer(name), rows)
    (line,) = logged()
    assert line.startswith("WARNING: ")
    assert f"{shown} (id {rows + len(special) - 1})" in line
    check_known_rows(recipe_of(tmp_path, rows))


@pytest.mark.parametrize(
    ("tokens", "special", "less", "shown"),
    [
        ([AddedToken("<tool>")], {}, 0, "<tool> (id ROWS)"),
        ([AddedToken("##"), AddedToken("@@")], {"pad_token": "[PAD]"}, 0, "## (id ROWS), @@ (id ROWS+1)"),
        ([], {"eos_token": "<end>"}, 0, "<end> (id ROWS)"),
        ([], {}, 2, "and"),
    ],
    ids=["added", "two", "eos", "vocabulary"],
)
def test_tokens_of_texts_need_a_row(
    tmp_path: Path, tokens: list[AddedToken], special: dict[str, str], less: int, shown: str
) -> None:
    name, rows = tokenizer_with(tmp_path, *tokens, **special)
    checks: list[Callable[[], None]] = [
        lambda: check_rows(load_tokenizer(name), rows - less),
        lambda: check_known_rows(recipe_of(tmp_path, rows - less)),
    ]
    for check in checks:
        with pytest.raises(CorpusError) as caught:
            check()
        assert f"without a row in the model's embeddings, which have {rows - less}: " in caught.value.problem
        if not less:
            listed = shown.replace("ROWS+1", str(rows + 1)).replace("ROWS", str(rows))
            assert caught.value.problem.endswith(f": {listed}")
    check_rows(load_tokenizer(name), rows + 9)
    check_known_rows(recipe_of(tmp_path, rows + 9))


def test_a_corpus_tokenizer_is_compared_with_the_reference(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    name, rows = tokenizer_with(tmp_path / "own", AddedToken("<tool>"))
    with pytest.raises(CorpusError, match="<tool>"):
        check_known_rows(recipe_of(tmp_path / "model", rows, tokenizer=name))
    check_known_rows(recipe_of(tmp_path / "model", rows))  # the reference has no tokenizer files to look at


def test_prepare_compares_before_it_tokenizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, rows = tokenizer_with(tmp_path / "own", AddedToken("<tool>"))
    corpus = corpus_of(files_source(write_jsonl(tmp_path / "corpus.jsonl", make_texts(40))))
    monkeypatch.setattr(writer.Build, "run", lambda _: pytest.fail("documents were tokenized"))
    for tokenizer, entries in ((name, rows), (TRAINED, 270)):
        with pytest.raises(CorpusError, match="without a row"):
            prepare(corpus, tokenizer, tmp_path / "cache", rows=entries)


def test_prepare_compares_tokens_that_were_made_before(tmp_path: Path) -> None:
    corpus = corpus_of(files_source(write_jsonl(tmp_path / "corpus.jsonl", make_texts(40))))
    prepare(corpus, TRAINED, tmp_path / "cache")
    with pytest.raises(CorpusError, match="without a row"):
        prepare(corpus, TRAINED, tmp_path / "cache", rows=270)
