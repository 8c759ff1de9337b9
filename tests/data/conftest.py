"""Fixtures of the data wing: real corpora and tokenizers where the checkout has them beside it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inheritune_ds.config.corpus import Corpus
from inheritune_ds.data.tokens.prepare import prepare
from inheritune_ds.data.tokens.token_set import TokenSet
from inheritune_ds.data.tokens.tokenizer import train_tokenizer
from tests.data.prepared import Prepare, make_corpus, make_texts

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the real corpora and tokenizers (../shared/data) are not beside this checkout")
    return SHARED


@pytest.fixture
def tokenizer_folder(shared: Path, tmp_path: Path) -> Callable[..., str]:
    """Copy files of the real tokenizers into a folder of their own, as `name=path under tokenizers/`."""

    def make(**files: str) -> str:
        folder = tmp_path / "-".join(sorted(files))
        folder.mkdir()
        for name, source in files.items():
            shutil.copyfile(shared / "tokenizers" / source, folder / name.replace("__", "."))
        return str(folder)

    return make


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small byte-level BPE in a folder."""
    folder = tmp_path_factory.mktemp("bpe")
    train_tokenizer(make_texts(50), 300).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """40 documents."""
    return make_corpus(tmp_path, make_texts(40))


@pytest.fixture
def prepared(tmp_path: Path, bpe: str) -> Prepare:
    """Prepare a corpus with the small BPE, in the folder `cache`."""

    def run(corpus: Corpus, **options: Any) -> TokenSet:
        return prepare(corpus, bpe, tmp_path / "cache", **options)

    return run
