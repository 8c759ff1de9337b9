from pathlib import Path
from typing import Any

import pytest

from inheritune_ds.cli import main
from inheritune_ds.config.corpus import Corpus
from inheritune_ds.data.tokens.tokenizer import train_tokenizer
from inheritune_ds.errors import RecipeError
from tests.data.prepared import files_source, is_held, make_texts, recipe_file, write_jsonl


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    train_tokenizer(make_texts(50), 300).save_pretrained(tmp_path / "bpe")
    texts = make_texts(40, words=30)
    read: list[Any] = [
        files_source(write_jsonl(tmp_path / "books.jsonl", [*texts, *texts[:3], ""])),
        files_source(write_jsonl(tmp_path / "web.jsonl", make_texts(30, seed=2))),
    ]
    evaluation = files_source(write_jsonl(tmp_path / "quiz.jsonl", texts[:5]))
    return recipe_file(
        tmp_path, Corpus(sources=read, validation_ratio=0.2, overlap_with=[evaluation]), str(tmp_path / "bpe")
    )


def test_prepare_prints_the_counts_of_every_source(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prepare", "--recipe", str(recipe), "--cache-dir", str(tmp_path / "cache")]
    assert main(command) == 0
    out, error = capsys.readouterr()
    assert error == ""
    head, titles, books, web, skipped, overlap = out.splitlines()
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    assert head == f"tokens: {folder} (uint16, 6 files)"
    assert titles.split("  ")[0] == "source"
    texts = make_texts(40, words=30)
    held = sum(map(is_held, [*texts, *texts[:3]]))
    assert books.split()[0::3][0] == "books"
    assert books.split()[-3:] == ["43", str(held), "3"]
    assert web.split()[-3:] == ["30", str(sum(map(is_held, make_texts(30, seed=2)))), "0"]
    assert skipped == "skipped in books: 1 empty"
    hit = sum(not is_held(text) for text in texts[:5])
    copies = sum(not is_held(text) for text in texts[:3])
    assert overlap == f"overlap with quiz: {hit} of 5 items occur in {hit + copies} training documents"
    assert main(command) == 0
    assert capsys.readouterr().out == out


def test_override_makes_other_tokens(tmp_path: Path, recipe: Path) -> None:
    for ratio in ("0.2", "0.3"):
        given = ["prepare", "--recipe", str(recipe), "--cache-dir", str(tmp_path / "cache")]
        assert main([*given, f"corpus.validation_ratio={ratio}"]) == 0
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2


@pytest.mark.parametrize("workers", ["0", "-1"])
def test_workers_below_one_are_refused(recipe: Path, workers: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "--recipe", str(recipe), f"--workers={workers}"]) == RecipeError.exit_code
    assert capsys.readouterr().err.splitlines() == [
        f"inheritune-ds: error: --workers {workers} is not accepted",
        "  allowed: 1, 2, 3, ...",
        "  do: change --workers",
    ]


def test_untrained_tokenizer_of_a_reference_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prepare", "--recipe", "quickstart", "--runs-dir", str(tmp_path / "runs"), "corpus.tokenizer=null"]
    assert main(command) == RecipeError.exit_code
    error = capsys.readouterr().err
    assert "uses the tokenizer of its reference quickstart-reference, which has not been trained yet" in error
    assert "do: train quickstart-reference first (train.py --recipe quickstart-reference)" in error
