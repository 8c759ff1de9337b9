"""Training tokens of a corpus: from finished token files where there are any, else a marked estimate."""

import json
import platform
from pathlib import Path
from typing import Any

import pytest

from inheritune_ds.config.corpus import Corpus, TrainedTokenizer
from inheritune_ds.config.loading import load_recipe
from inheritune_ds.data.documents import python_docs
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


TEXT: dict[str, Any] = {"kind": "files", "paths": ["a.txt"]}
HUB: dict[str, Any] = {"kind": "hub", "dataset": "a/b", "data_files": "*.parquet"}
HALF = {**TEXT, "weight": 1.0}


@pytest.mark.parametrize(
    ("sources", "max_tokens", "tokens"),
    [
        ([TEXT], None, 800),  # 4000 bytes / 4, without the held-out 20 %
        ([TEXT, {"kind": "files", "paths": ["b.jsonl.gz"]}], None, 800 + 600),
        ([{"kind": "nanogpt", "train": "train.bin"}], None, 800),
        ([TEXT], 5, 5),
        ([TEXT], 1_000_000, 800),
        ([{**TEXT, "max_tokens": 300}], None, 300),
        ([HALF, HALF], 1_000, 1_000),
        ([HALF, HALF], 10_000, 1_600),
        ([HUB], 5, 5),
        ([HUB], None, None),
        ([{**HUB, "download_gib": 1.0}], None, int(2**30 * 1.7 / 4 * 0.8)),
        ([{**HUB, "download_gib": 1.0, "published_tokens": 1000}], None, 800),
        ([{**HUB, "published_tokens": 1000}], 500, 500),
        ([TEXT, {**HUB, "published_tokens": 1000}], None, 1600),
        ([TEXT, {**HUB, "max_tokens": 70}], None, 870),
        ([{**TEXT, "max_tokens": 300}, HUB], None, None),
    ],
)
def test_estimate_is_a_quarter_of_the_bytes_up_to_the_limits(
    sources: list[dict[str, Any]],
    max_tokens: int | None,
    tokens: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, size in (("a.txt", 4000), ("b.jsonl.gz", 1000), ("train.bin", 2000)):
        Path(name).write_bytes(b"x" * size)
    expected = None if tokens is None else Tokens((tokens,), estimate=True)
    assert estimate_tokens(corpus(*sources, max_tokens=max_tokens)) == expected


def test_estimate_of_the_embedded_corpus_counts_its_bytes() -> None:
    estimated = estimate_tokens(corpus({"kind": "embedded"}, validation_ratio=0.1))
    assert estimated is not None
    size = sum(len(text.encode()) for text in python_docs.running().documents)
    assert estimated.count == int(size / 3.56 * 0.9)
    if platform.python_version_tuple()[:2] == ("3", "11"):
        assert estimated.count == pytest.approx(618_377, rel=0.02)  # `inheritune-ds prepare quickstart`


@pytest.mark.parametrize(
    ("preset", "ratio", "published"),
    [
        ("openwebtext", 0.000_490_585, 9_035_582_198),  # nanoGPT holds out 0.05 %
        ("fineweb-edu", 0.01, 99e9),
        ("slimpajama", 0.01, 627e9 * 0.99),
        ("starcoderdata", 0.01, (627e9 * 0.948 + 250e9) * 0.99),
        ("redpajama-1t-sample", 0.01, 0.99e9),
    ],
)
def test_estimate_of_a_preset_is_its_published_count(preset: str, ratio: float, published: float) -> None:
    recipe = load_recipe("gpt2-medium-24l", [f"corpus.preset={preset}", f"corpus.validation_ratio={ratio}"])
    estimated = estimate_tokens(recipe.corpus)
    assert estimated is not None
    assert estimated.count == pytest.approx(published, rel=2e-3)
    assert estimated.estimate


@pytest.mark.parametrize("max_tokens", [None, 5])
def test_estimate_refuses_a_missing_file(tmp_path: Path, max_tokens: int | None) -> None:
    with pytest.raises(CorpusError, match=r"missing\.txt"):
        estimate_tokens(corpus(files(tmp_path / "missing.txt"), max_tokens=max_tokens))


def test_count_finds_the_token_files_that_prepare_wrote(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for name, path in zip("ab", paths, strict=True):
        path.write_text("\n".join(json.dumps({"text": f"{name} {n} {n * n}"}) for n in range(200)), encoding="utf-8")
    wanted = corpus(*(files(path) for path in paths))
    prepared = prepare(wanted, TrainedTokenizer(vocab_size=300), tmp_path / "cache")
    parts = tuple(source.train_tokens for source in prepared.sources)
    assert len(parts) == 2
    assert count_tokens(wanted, tmp_path / "cache") == Tokens(parts, estimate=False)
    paths[0].write_text('{"text": "another document"}', encoding="utf-8")
    changed = count_tokens(wanted, tmp_path / "cache")
    assert changed is not None
    assert changed.estimate


def test_count_compares_all_that_decides_the_tokens(tmp_path: Path) -> None:
    hub = {**HUB, "download_gib": 1.0}
    identity = {**HUB, "split": None, "text_field": "text", "max_documents": None, "bad_records": "refuse"}
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
def test_count_skips_an_unreadable_manifest(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "tokens" / "abc"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    assert count_tokens(corpus({"kind": "embedded"}, max_tokens=9), tmp_path) == Tokens((9,), estimate=True)
