"""Training tokens of a corpus: from finished token files where there are any, else a marked estimate."""

import gzip
import json
import platform
from pathlib import Path
from typing import Any

import pytest

from inheritune_ds.config.corpus import Corpus, TrainedTokenizer
from inheritune_ds.data.size import count_tokens, estimate_tokens
from inheritune_ds.data.tokens.prepare import prepare
from inheritune_ds.errors import CorpusError
from inheritune_ds.plan.budget import Tokens

TOKENIZER = {"vocab_size": 300}


def corpus(*sources: dict[str, Any], **changes: Any) -> Corpus:
    return Corpus.model_validate({"sources": list(sources), "tokenizer": TOKENIZER, "validation_ratio": 0.2, **changes})


def files(*paths: Path) -> dict[str, Any]:
    return {"kind": "files", "paths": [str(path) for path in paths]}


def write_manifest(cache: Path, wanted: Corpus, identity: dict[str, Any], **changes: Any) -> None:
    folder = cache / "tokens" / "abc"
    folder.mkdir(parents=True)
    manifest = {
        "tokenizer": {"train": 300},
        "corpus": wanted.model_dump(mode="json", include={"validation_ratio", "max_tokens", "token_dtype"}),
        "sources": [{"identity": {"max_tokens": None, **identity}, "train_tokens": 777}],
        **changes,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_estimate_is_a_quarter_of_the_bytes_without_the_held_out_part(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.txt", tmp_path / "b.jsonl.gz"
    plain.write_bytes(b"x" * 4000)
    packed.write_bytes(gzip.compress(b'{"text": "y"}' * 100))
    assert estimate_tokens(corpus(files(plain))) == Tokens((800,), estimate=True)
    both = int((4000 + 3 * packed.stat().st_size) / 4 * 0.8)
    assert estimate_tokens(corpus(files(plain, packed))) == Tokens((both,), estimate=True)


def test_estimate_takes_the_cap_before_any_size(tmp_path: Path) -> None:
    hub = {"kind": "hub", "dataset": "a/b", "data_files": "*.parquet"}
    assert estimate_tokens(corpus(hub, max_tokens=5)) == Tokens((5,), estimate=True)
    assert estimate_tokens(corpus(hub)) is None
    assert estimate_tokens(corpus({**hub, "download_gib": 1.0})) == Tokens((int(2**30 * 1.7 / 4 * 0.8),), estimate=True)


def test_estimate_takes_the_caps_of_sources_before_their_sizes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 4000)
    text, hub = files(tmp_path / "a.txt"), {"kind": "hub", "dataset": "a/b", "data_files": "*.parquet"}
    assert estimate_tokens(corpus({**text, "max_tokens": 300})) == Tokens((300,), estimate=True)
    assert estimate_tokens(corpus(text, {**hub, "max_tokens": 70})) == Tokens((870,), estimate=True)
    assert estimate_tokens(corpus({**text, "max_tokens": 300}, hub)) is None


def test_estimate_of_the_embedded_corpus_is_within_a_fifth_of_its_tokens() -> None:
    estimated = estimate_tokens(corpus({"kind": "embedded"}, validation_ratio=0.1))
    assert estimated is not None
    assert estimated.count == pytest.approx(618_377, rel=0.2)  # `inheritune-ds prepare quickstart`, CPython 3.11


@pytest.mark.parametrize("max_tokens", [None, 5])
def test_estimate_refuses_a_missing_file(tmp_path: Path, max_tokens: int | None) -> None:
    with pytest.raises(CorpusError, match=r"missing\.txt"):
        estimate_tokens(corpus(files(tmp_path / "missing.txt"), max_tokens=max_tokens))


def test_count_finds_the_token_files_that_prepare_wrote(tmp_path: Path) -> None:
    text = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"document number {n} of the corpus says {n * n}"}) for n in range(200)]
    text.write_text("\n".join(lines), encoding="utf-8")
    wanted = corpus(files(text))
    prepared = prepare(wanted, TrainedTokenizer(vocab_size=300), tmp_path / "cache")
    assert count_tokens(wanted, tmp_path / "cache") == Tokens((prepared.train_tokens,), estimate=False)
    text.write_text("\n".join(lines[1:]), encoding="utf-8")
    changed = count_tokens(wanted, tmp_path / "cache")
    assert changed is not None
    assert changed.estimate


def test_count_compares_all_that_decides_the_tokens(tmp_path: Path) -> None:
    hub = {"kind": "hub", "dataset": "a/b", "data_files": "*.parquet", "download_gib": 1.0}
    identity: dict[str, Any] = {
        "kind": "hub",
        "dataset": "a/b",
        "data_files": "*.parquet",
        "split": None,
        "text_field": "text",
    }
    identity |= {"max_documents": None, "bad_records": "refuse"}
    identity["filters"] = {"keep": {}, "drop": {}, "min_characters": 0, "max_characters": None}
    wanted = corpus(hub)
    write_manifest(tmp_path, wanted, identity)
    assert count_tokens(wanted, tmp_path) == Tokens((777,), estimate=False)
    others = [
        corpus({**hub, "data_files": "*.jsonl"}),
        corpus({**hub, "text_field": "body"}),
        corpus({**hub, "max_documents": 3}),
        corpus({**hub, "max_tokens": 3}),
        corpus({**hub, "filters": {"min_characters": 3}}),
        corpus(hub, hub),
        corpus({"kind": "embedded"}),
        corpus(hub, validation_ratio=0.1),
        corpus(hub, token_dtype="uint32"),
        corpus(hub, tokenizer={"vocab_size": 301}),
        corpus(hub, tokenizer="gpt2"),
        corpus(hub, tokenizer=None),
    ]
    for other in others:
        found = count_tokens(other, tmp_path)
        assert found is not None
        assert found.estimate


def test_count_knows_a_named_tokenizer_and_this_python(tmp_path: Path) -> None:
    wanted = corpus({"kind": "embedded"}, tokenizer="gpt2")
    identity = {"kind": "embedded", "python": platform.python_version()}
    write_manifest(tmp_path / "this", wanted, identity, tokenizer={"name": "gpt2"})
    assert count_tokens(wanted, tmp_path / "this") == Tokens((777,), estimate=False)
    write_manifest(tmp_path / "other", wanted, {**identity, "python": "3.0.0"}, tokenizer={"name": "gpt2"})
    assert count_tokens(wanted, tmp_path / "other") != Tokens((777,), estimate=False)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"tokenizer": 3}'])
def test_count_passes_over_a_manifest_it_cannot_read(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "tokens" / "abc"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    assert count_tokens(corpus({"kind": "embedded"}, max_tokens=9), tmp_path) == Tokens((9,), estimate=True)


def test_count_tells_every_source(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for name, path in zip("ab", paths, strict=True):
        path.write_text("\n".join(json.dumps({"text": f"{name} {n} {n * n}"}) for n in range(200)), encoding="utf-8")
    wanted = corpus(*(files(path) for path in paths))
    prepared = prepare(wanted, TrainedTokenizer(vocab_size=300), tmp_path / "cache")
    parts = tuple(source.train_tokens for source in prepared.sources)
    assert len(parts) == 2
    assert count_tokens(wanted, tmp_path / "cache") == Tokens(parts, estimate=False)


def test_estimate_counts_the_tokens_of_token_files(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(b"x" * 2000)
    source = {"kind": "nanogpt", "train": str(tmp_path / "train.bin")}
    assert estimate_tokens(corpus(source)) == Tokens((800,), estimate=True)


def test_estimate_is_no_more_than_the_corpus_has(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_bytes(b"x" * 4000)
    assert estimate_tokens(corpus(files(text), max_tokens=1_000_000)) == Tokens((800,), estimate=True)
    assert estimate_tokens(corpus(files(text), max_tokens=5)) == Tokens((5,), estimate=True)
    half = [{**files(text), "weight": 1.0}, {**files(text), "weight": 1.0}]
    assert estimate_tokens(corpus(*half, max_tokens=1_000)) == Tokens((1_000,), estimate=True)
    assert estimate_tokens(corpus(*half, max_tokens=10_000)) == Tokens((1_600,), estimate=True)
