import hashlib
import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from inheritune_ds.config.corpus import Corpus, EmbeddedSource, HubSource, TrainedTokenizer
from inheritune_ds.data.documents.holdout import is_held_out
from inheritune_ds.data.tokens import plan
from inheritune_ds.data.tokens import prepare as tokenize
from inheritune_ds.data.tokens.prepare import prepare
from inheritune_ds.data.tokens.tokenizer import load_tokenizer, train_tokenizer
from inheritune_ds.data.tokens.writer import Build
from inheritune_ds.errors import CorpusError
from inheritune_ds.storage import hub
from tests.data.prepared import (
    END,
    TRAINED,
    Prepare,
    corpus_of,
    files_below,
    files_source,
    is_held,
    make_corpus,
    make_texts,
    names_in,
    tokens_of,
    word_level,
    write_jsonl,
)


@given(digest=st.binary(min_size=32, max_size=32), ratio=st.floats(0.001, 0.999))
def test_held_out_compares_the_hash_with_the_ratio(digest: bytes, ratio: float) -> None:
    assert is_held_out(digest, ratio) is (int(digest.hex()[:16], 16) / 2**64 < ratio)


def test_prepare_writes_each_document_once_in_its_part(tmp_path: Path, bpe: str) -> None:
    texts = make_texts(60)
    tokens = prepare(make_corpus(tmp_path, [*texts, "", " \n "]), bpe, tmp_path / "cache")
    tokenizer = load_tokenizer(bpe)
    expected: dict[str, list[int]] = {"train": [], "validation": []}
    for text in texts:
        expected["validation" if is_held(text) else "train"] += [*tokenizer(text)["input_ids"], END]
    assert {part: tokens_of(tokens, part) for part in expected} == expected
    counts = {part: len(ids) for part, ids in expected.items()}
    assert (tokens.train_tokens, tokens.validation_tokens) == (counts["train"], counts["validation"])
    held = sum(map(is_held, texts))
    assert (tokens.manifest["train_documents"], tokens.manifest["validation_documents"]) == (60 - held, held)
    (entry,) = tokens.manifest["sources"]
    assert entry | {"identity": None} == {
        "identity": None,
        "name": "corpus",
        "documents": 60,
        "train_documents": 60 - held,
        "validation_documents": held,
        "train_tokens": counts["train"],
        "validation_tokens": counts["validation"],
        "empty_documents": 2,
        "filtered_documents": 0,
        "bad_records": 0,
        "duplicate_documents": 0,
        "forced_cuts": 0,
        "first_bad_record": "",
        "left_out_files": [],
        "train": [{"file": "train-00000.bin", "tokens": counts["train"], "documents": 60 - held}],
        "validation": [{"file": "validation-00000.bin", "tokens": counts["validation"], "documents": held}],
    }
    assert names_in(tokens.folder.parent) == [tokens.fingerprint]


def test_shards_end_with_documents_and_hold_the_same_tokens_as_one(tmp_path: Path, prepared: Prepare) -> None:
    corpus = make_corpus(tmp_path, make_texts(120))
    whole = prepared(corpus)
    cut = prepared(corpus, shard_tokens=500)
    assert cut.fingerprint != whole.fingerprint
    (source,) = cut.sources
    assert len(source.train) == 5
    for shard in (*source.train, *source.validation):
        ids = np.fromfile(shard.path, "<u2")
        assert len(ids) == shard.tokens == shard.path.stat().st_size / 2
        assert ids[-1] == END
    lengths = np.diff(np.flatnonzero(np.array(tokens_of(whole)) == END), prepend=-1)
    for shard in source.train[:-1]:
        assert 500 <= shard.tokens < 500 + lengths.max()
    for part in ("train", "validation"):
        assert tokens_of(cut, part) == tokens_of(whole, part)


def test_prepare_describes_the_result_in_its_manifest(tmp_path: Path, bpe: str) -> None:
    tokens = prepare(make_corpus(tmp_path, make_texts(40)), bpe, tmp_path / "cache")
    manifest = json.loads((tokens.folder / "manifest.json").read_text())
    assert manifest == tokens.manifest
    assert tokens.folder == tmp_path / "cache" / "tokens" / tokens.fingerprint
    assert manifest["format"] == plan.FORMAT
    assert manifest["versions"] == {"python": platform.python_version(), "tokenizers": version("tokenizers")}
    assert (tokens.eos_id, manifest["bos_id"], manifest["document_form"]) == (END, END, "text <|endoftext|>")
    assert manifest["tokenizer"]["name"] == bpe
    assert tokens.vocab_size == len(load_tokenizer(bpe))
    corpus = (tmp_path / "corpus.jsonl").read_bytes()
    assert manifest["sources"][0]["identity"]["files"] == [
        {"name": "corpus.jsonl", "size": len(corpus), "sha256": hashlib.sha256(corpus).hexdigest()}
    ]
    files = {
        name: {"bytes": (tokens.folder / name).stat().st_size, "sha256": digest}
        for name, digest in files_below(tokens.folder).items()
        if name != "manifest.json"
    }
    assert {"corpus/train-00000.bin", "corpus/validation-00000.bin", "tokenizer/tokenizer.json"} <= set(files)
    assert manifest["files"] == files
    fidelity = manifest["fidelity"]
    assert (fidelity["documents"], fidelity["exact"]) == (tokenize.SAMPLE_DOCUMENTS, tokenize.SAMPLE_DOCUMENTS)


def test_no_held_out_document_is_trained_on_for_any_order_of_the_files(tmp_path: Path, prepared: Prepare) -> None:
    texts = make_texts(80)
    files = [write_jsonl(tmp_path / f"{n}.jsonl", texts[start : start + 50]) for n, start in enumerate((0, 20, 30))]
    found = []
    for order in (files, files[::-1]):
        sources: list[Any] = [files_source(path, name=path.stem) for path in order]
        tokens = prepared(corpus_of(*sources))
        parts = {}
        for part in ("train", "validation"):
            ids = [i for source in sources for i in tokens_of(tokens, part, source.name)]
            parts[part] = {tuple(text) for text in np.split(ids, np.flatnonzero(np.array(ids) == END) + 1)}
        assert parts["train"] & parts["validation"] == {()}
        found.append(parts)
    assert found[0] == found[1]
    assert len(found[0]["validation"]) == 1 + sum(map(is_held, texts))


def test_prepare_warns_of_a_tokenizer_that_loses_text(tmp_path: Path, logged: Callable[[], list[str]]) -> None:
    folder = word_level(tmp_path / "words", {"<|endoftext|>": END, "cat": 1})
    tokens = prepare(make_corpus(tmp_path, make_texts(40)), folder, tmp_path / "cache")
    (line,) = logged()
    assert line.startswith("WARNING: the tokenizer does not reproduce texts: 32 of 32 sample documents")
    assert tokens.manifest["fidelity"]["lossy"] == 32


def test_prepare_finds_its_own_result(
    corpus: Corpus, prepared: Prepare, monkeypatch: pytest.MonkeyPatch, logged: Callable[[], list[str]]
) -> None:
    first = prepared(corpus)
    monkeypatch.setattr(Build, "run", lambda _: pytest.fail("built twice"))
    assert prepared(corpus) == first
    assert logged() == []


def test_fingerprint_follows_everything_that_decides_the_tokens(tmp_path: Path, bpe: str) -> None:
    texts = make_texts(40)
    train_tokenizer(make_texts(50, seed=2)[:20], 290).save_pretrained(tmp_path / "other")
    path = write_jsonl(tmp_path / "a" / "corpus.jsonl", texts)

    def sourced(**settings: Any) -> Corpus:
        return corpus_of(files_source(path, **settings))

    with_set = make_corpus(tmp_path / "a", texts, overlap_with=[files_source(path)])
    variants: dict[str, tuple[Corpus, str | TrainedTokenizer]] = {
        "base": (make_corpus(tmp_path / "a", texts), bpe),
        "text": (make_corpus(tmp_path / "b", [*texts[:-1], "another"]), bpe),
        "ratio": (make_corpus(tmp_path / "a", texts, validation_ratio=0.3), bpe),
        "max_tokens": (make_corpus(tmp_path / "a", texts, max_tokens=700), bpe),
        "duplicates": (make_corpus(tmp_path / "a", texts, duplicates="drop"), bpe),
        "overlap": (with_set, bpe),
        "overlap_ngram": (with_set.model_copy(update={"overlap_ngram": 12}), bpe),
        "overlap_filters": (
            make_corpus(tmp_path / "a", texts, overlap_with=[files_source(path, filters={"max_characters": 90})]),
            bpe,
        ),
        "dtype": (make_corpus(tmp_path / "a", texts, token_dtype="uint32"), bpe),
        "name": (sourced(name="other"), bpe),
        "filters": (sourced(filters={"min_characters": 2}), bpe),
        "bad_records": (sourced(bad_records="skip"), bpe),
        "max_documents": (sourced(max_documents=39), bpe),
        "source_tokens": (sourced(max_tokens=800), bpe),
        "separator": (sourced(document_separator="x"), bpe),
        "tokenizer": (make_corpus(tmp_path / "a", texts), str(tmp_path / "other")),
        "trained": (make_corpus(tmp_path / "a", texts), TRAINED),
        "trained on": (make_corpus(tmp_path / "a", texts), TrainedTokenizer(vocab_size=301)),
    }
    found = {name: prepare(*variant, tmp_path / "cache").fingerprint for name, variant in variants.items()}
    assert len(set(found.values())) == len(variants), found


def test_fingerprint_does_not_follow_places_names_and_weights(tmp_path: Path, bpe: str) -> None:
    load_tokenizer(bpe).save_pretrained(tmp_path / "copy")
    texts = make_texts(40)
    here = prepare(make_corpus(tmp_path / "a", texts), bpe, tmp_path / "cache")
    there = prepare(make_corpus(tmp_path / "b", texts), str(tmp_path / "copy"), tmp_path / "cache")
    weighted = corpus_of(files_source(tmp_path / "a" / "corpus.jsonl", weight=3.0))
    assert there == here
    assert prepare(weighted, bpe, tmp_path / "cache") == here


def test_fingerprint_follows_the_library_that_trains(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(corpus, TRAINED, tmp_path / "cache")
    monkeypatch.setattr(plan, "version", lambda _name: "99.0")
    assert prepare(corpus, TRAINED, tmp_path / "cache").fingerprint != first.fingerprint
    assert first.manifest["tokenizer"]["train"] == 300


def test_prepare_trains_a_tokenizer_without_the_held_out_documents(tmp_path: Path) -> None:
    texts = [*make_texts(60), *(f"zyzzyva {number} zyzzyva zyzzyva" for number in range(200))]
    texts = [text for text in texts if is_held(text) == text.startswith("zyzzyva")]
    tokens = prepare(make_corpus(tmp_path, texts), TRAINED, tmp_path / "cache")
    tokenizer = load_tokenizer(str(tokens.tokenizer_dir))
    assert tokens.vocab_size == len(tokenizer) <= 300
    assert len(tokenizer(" zyzzyva")["input_ids"]) == 8
    assert len(tokenizer(" cat")["input_ids"]) == 1


def test_prepare_takes_the_integer_type_asked_for(tmp_path: Path, prepared: Prepare) -> None:
    small = prepared(make_corpus(tmp_path, make_texts(40)))
    large = prepared(make_corpus(tmp_path, make_texts(40), token_dtype="uint32"))
    assert (small.token_dtype, large.token_dtype) == ("uint16", "uint32")
    assert large.sources[0].train[0].path.stat().st_size == 4 * large.train_tokens
    assert tokens_of(large) == tokens_of(small)


@pytest.mark.parametrize(("extra", "dtype"), [(65_535, "uint16"), (65_536, "uint32")])
def test_prepare_takes_the_smallest_type_that_holds_the_largest_id(tmp_path: Path, extra: int, dtype: str) -> None:
    folder = word_level(tmp_path / "words", {"<|endoftext|>": END, "cat": 1, "dog": extra})
    tokens = prepare(make_corpus(tmp_path, make_texts(40)), folder, tmp_path / "cache")
    assert (tokens.token_dtype, tokens.vocab_size) == (dtype, extra + 1)
    assert extra in tokens_of(tokens)


@pytest.mark.parametrize("template", ["<|endoftext|> $A", "<|endoftext|> $A dog", "$A dog <|endoftext|>", "dog $A"])
def test_manifest_describes_the_tokens_around_a_text(tmp_path: Path, template: str) -> None:
    folder = Path(word_level(tmp_path / "tokenizer", {"<|endoftext|>": END, "cat": 1, "dog": 2}))
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["dog"])
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<|endoftext|>", END), ("dog", 2)]
    )
    backend.save(str(folder / "tokenizer.json"))
    corpus = make_corpus(tmp_path, [f"{number} cat" for number in range(40)])
    found = prepare(corpus, str(folder), tmp_path / "cache")
    form = template.replace("$A", "text").removesuffix(" <|endoftext|>") + " <|endoftext|>"
    assert found.manifest["document_form"] == form
    ids = {"<|endoftext|>": END, "text": None, "dog": 2}
    document = [number for word in form.split() for number in ([1, 1] if ids[word] is None else [ids[word]])]
    assert tokens_of(found) == document * found.manifest["train_documents"]


def test_prepare_makes_tokens_of_the_embedded_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = corpus_of(EmbeddedSource(kind="embedded"), validation_ratio=0.1)
    tokens = prepare(corpus, TrainedTokenizer(vocab_size=4096), tmp_path)
    assert tokens.vocab_size == 4096
    assert 300_000 < tokens.train_tokens < 1_500_000
    assert tokens.manifest["sources"][0]["unparsed_files"] == 0
    monkeypatch.setattr(Build, "run", lambda _: pytest.fail("built twice"))
    assert prepare(corpus, TrainedTokenizer(vocab_size=4096), tmp_path) == tokens


@pytest.mark.parametrize("kind", ["named", "trained"])
def test_prepare_refuses_ids_that_do_not_fit_before_reading(tmp_path: Path, kind: str) -> None:
    corpus = make_corpus(tmp_path, make_texts(4), token_dtype="uint16")
    folder = word_level(tmp_path / "words", {"<|endoftext|>": END, "cat": 1, "dog": 70_000})
    tokenizer = folder if kind == "named" else TrainedTokenizer(vocab_size=70_001)
    message = r"(?s)token_dtype uint16 holds 65,536 ids, but the vocabulary has 70,001.*corpus\.token_dtype=auto"
    with pytest.raises(CorpusError, match=message):
        prepare(corpus, tokenizer, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_prepare_needs_a_token_that_ends_texts(tmp_path: Path, tokenizer_folder: Callable[..., str]) -> None:
    folder = tokenizer_folder(tokenizer__json="llama/tokenizer.json")
    message = r'(?s)has no eos_token, .*<unk>, <s>, </s>.*tokenizer_config\.json with \{"eos_token": "\.\.\."\}'
    with pytest.raises(CorpusError, match=message):
        prepare(make_corpus(tmp_path, make_texts(4)), folder, tmp_path / "cache")
    (Path(folder) / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert prepare(make_corpus(tmp_path, make_texts(40)), folder, tmp_path / "cache").eos_id == 2


def test_prepare_reports_that_no_special_token_is_declared(tmp_path: Path) -> None:
    folder = word_level(tmp_path / "words", {"cat": 0, "dog": 1}, eos=False)
    with pytest.raises(CorpusError, match="one of its special tokens: none is declared"):
        prepare(make_corpus(tmp_path, make_texts(4)), folder, tmp_path / "cache")


def test_a_branch_that_moves_is_read_at_the_commit_that_was_identified(
    tmp_path: Path, prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {letter * 40: make_texts(40, seed) for seed, letter in enumerate("ab")}
    for commit, documents in texts.items():
        write_jsonl(tmp_path / commit / "a.jsonl", documents)
    tips = iter(texts)

    def resolve(name: str, revision: str, repo_type: hub.RepoType) -> hub.Repository:
        return hub.Repository(name, repo_type, next(tips) if revision == "main" else revision, "")

    monkeypatch.setattr(hub, "resolve", resolve)
    monkeypatch.setattr(hub, "list_files", lambda _repository: ["a.jsonl"])
    monkeypatch.setattr(hub, "snapshot", lambda repository, _patterns: tmp_path / repository.commit)
    source = HubSource(kind="hub", dataset="org/corpus", data_files="a.jsonl", streaming=False)
    found = prepared(corpus_of(source))
    assert found.manifest["sources"][0]["identity"]["commit"] == "a" * 40
    local = prepared(corpus_of(files_source(tmp_path / ("a" * 40))))
    assert tokens_of(found) == tokens_of(local, source="a" * 40)
