"""A document of 50 MB: encoded in pieces, in bounded memory, with the ids of the whole."""

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.tokenize import watch
from inheritune_ds.data.tokens.token_set import open_finished
from tests.data.prepared import files_source, is_held, make_corpus, make_texts, recipe_file, write_jsonl

LONG_BYTES = 50 * 10**6
MOST_BYTES = 10**9
END_OF_TEXT = 50256


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.timeout(600)
def test_prepare_encodes_a_document_of_50_mb_exactly_in_less_than_1_gb(
    shared: Path, tmp_path: Path, tokenizer_folder: Callable[..., str]
) -> None:
    from tokenizers import Tokenizer

    with gzip.open(shared / "corpora" / "openstax" / "us_history.jsonl.gz", "rt", encoding="utf-8") as stream:
        chapter = "".join(json.loads(next(stream))["text"] + "\n\n" for _ in range(20))
    times = LONG_BYTES // len(chapter.encode()) + 1
    long_one = f"{chapter * times}the end"
    # The pre-tokenizer cuts at white space, so every chapter but the last has the ids that it has before another one.
    backend: Any = Tokenizer.from_file(str(shared / "tokenizers" / "gpt2" / "tokenizer.json"))
    last, two, three = (backend.encode(f"{chapter * count}the end").ids for count in (1, 2, 3))
    each = two[: len(two) - len(last)]
    assert three == each * 2 + last
    expected = np.array([*each * (times - 1), *last, END_OF_TEXT], np.uint16)

    short = make_corpus(tmp_path, make_texts(20))
    alone: Any = files_source(write_jsonl(tmp_path / "long.jsonl", [long_one]), name="long")
    corpus = short.model_copy(update={"sources": [*short.sources, alone]})
    tokenizer = tokenizer_folder(tokenizer__json="gpt2/tokenizer.json")
    command = [sys.executable, "-m", "inheritune_ds", "prepare", "--workers", "2"]
    command += ["--recipe", str(recipe_file(tmp_path, corpus, tokenizer)), "--cache-dir", str(tmp_path / "cache")]
    watched = watch(command)
    assert watched["processes"] >= 3, "no workers were started"
    assert watched["peak_rss_bytes"] < MOST_BYTES
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    tokens = open_finished(folder, folder.name)
    assert tokens is not None
    source = tokens.sources[1]
    (shard,) = source.validation if is_held(long_one) else source.train
    assert np.array_equal(np.fromfile(shard.path, "<u2"), expected)
    assert tokens.manifest["forced_cuts"] == 0
