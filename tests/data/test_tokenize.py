import hashlib
import json
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inheritune_ds.corpus import Corpus, EmbeddedSource, FilesSource, TrainedTokenizer
from inheritune_ds.data import sources, token_set, tokenize
from inheritune_ds.data.tokenize import TokenSet, held_out, load_tokenizer, prepare
from inheritune_ds.data.vocabulary import train_tokenizer
from inheritune_ds.errors import CorpusError, StorageError

TRAINED = TrainedTokenizer(vocab_size=300)


def make_texts(count: int, seed: int = 1) -> list[str]:
    words = random.Random(seed)
    return [
        " ".join(words.choices(["the", "a", "cat", "dog", "sat", "on", "mat", "log", "and", "ran"], k=20))
        for _ in range(count)
    ]


def make_corpus(folder: Path, texts: list[str], **settings: Any) -> Corpus:
    folder.mkdir(exist_ok=True)
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    given = {"validation_ratio": 0.2, **settings}
    return Corpus(sources=[FilesSource(kind="files", paths=[str(path)])], **given)


def tokens_in(path: Path, tokens: TokenSet) -> list[int]:
    ids: list[int] = np.frombuffer(path.read_bytes(), np.dtype(tokens.token_dtype).newbyteorder("<")).tolist()
    return ids


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bpe")
    train_tokenizer(make_texts(50), 300).save_pretrained(folder)
    return str(folder)


@given(text=st.text(), ratio=st.floats(0.001, 0.999))
def test_held_out_compares_the_hash_with_the_ratio(text: str, ratio: float) -> None:
    fraction = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64
    assert held_out(text, ratio) is (fraction < ratio)


def test_held_out_takes_about_the_share_asked_for() -> None:
    taken = [text for text in (f"document {number}" for number in range(10_000)) if held_out(text, 0.1)]
    assert 900 < len(taken) < 1100
    assert all(held_out(text, 0.2) for text in taken)


def test_prepare_writes_each_document_once_in_its_part(tmp_path: Path, bpe: str) -> None:
    texts = make_texts(60)
    tokens = prepare(make_corpus(tmp_path, [*texts, "", " \n "]), bpe, tmp_path / "cache")
    tokenizer = load_tokenizer(bpe)
    train: list[int] = []
    validation: list[int] = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        (validation if held_out(text, 0.2) else train).extend([*ids, tokenizer.eos_token_id])
    assert tokens_in(tokens.train_path, tokens) == train
    assert tokens_in(tokens.validation_path, tokens) == validation
    assert (tokens.train_tokens, tokens.validation_tokens) == (len(train), len(validation))
    num_validation = sum(held_out(text, 0.2) for text in texts)
    assert (tokens.train_documents, tokens.validation_documents) == (60 - num_validation, num_validation)
    assert tokens.token_dtype == "uint16"
    assert tokens.manifest["sources"][0] | {"identity": None} == {
        "identity": None,
        "documents": 60,
        "held_out_documents": num_validation,
        "empty_documents": 2,
        "train_tokens": len(train),
        "validation_tokens": len(validation),
    }


def test_prepare_describes_the_result_in_its_manifest(tmp_path: Path, bpe: str) -> None:
    import platform

    import tokenizers

    tokens = prepare(make_corpus(tmp_path, make_texts(40)), bpe, tmp_path / "cache")
    manifest = json.loads((tokens.folder / "manifest.json").read_text())
    assert manifest == tokens.manifest
    assert tokens.folder == tmp_path / "cache" / "tokens" / tokens.fingerprint
    assert manifest["format"] == tokenize.FORMAT
    assert manifest["versions"] == {"python": platform.python_version(), "tokenizers": tokenizers.__version__}
    assert (tokens.eos_id, manifest["bos_id"], manifest["document_form"]) == (0, 0, "text <|endoftext|>")
    assert manifest["tokenizer"]["name"] == bpe
    assert tokens.vocab_size == len(load_tokenizer(bpe))
    files = {
        path.relative_to(tokens.folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in tokens.folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    assert {"train.bin", "validation.bin", "tokenizer/tokenizer.json"} <= set(files)
    assert manifest["files"] == files


def test_prepare_finds_its_own_result(tmp_path: Path, bpe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus(tmp_path, make_texts(40))
    lines: list[str] = []
    first = prepare(corpus, bpe, tmp_path / "cache", say=lines.append)
    monkeypatch.setattr(tokenize, "_build", lambda *_: pytest.fail("built twice"))
    assert prepare(corpus, bpe, tmp_path / "cache", say=lines.append) == first
    assert lines == []


@pytest.mark.parametrize("name", ["train.bin", "tokenizer/tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_prepare_makes_incomplete_tokens_anew(tmp_path: Path, bpe: str, name: str, damage: str) -> None:
    corpus = make_corpus(tmp_path, make_texts(40))
    first = prepare(corpus, bpe, tmp_path / "cache")
    content = (first.folder / name).read_bytes()
    if damage == "cut":
        (first.folder / name).write_bytes(content[:-2])
    else:
        (first.folder / name).unlink()
    assert prepare(corpus, bpe, tmp_path / "cache") == first
    assert (first.folder / name).read_bytes() == content
    assert [path.name for path in first.folder.parent.iterdir()] == [first.fingerprint]


def flipped(content: bytes) -> bytes:
    """Turn one bit: the size stays."""
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "tokenizer/tokenizer.json"])
def test_prepare_makes_damaged_tokens_of_the_same_size_anew_and_says_so(tmp_path: Path, bpe: str, name: str) -> None:
    corpus = make_corpus(tmp_path, make_texts(40))
    first = prepare(corpus, bpe, tmp_path / "cache")
    content = (first.folder / name).read_bytes()
    (first.folder / name).write_bytes(flipped(content))
    lines: list[str] = []
    assert prepare(corpus, bpe, tmp_path / "cache", say=lines.append) == first
    (line,) = lines
    assert line.startswith(f"WARNING: the tokens in {first.folder} are damaged and are made anew from the corpus: ")
    assert f"{name} has sha256 {hashlib.sha256(flipped(content)).hexdigest()[:12]}... not " in line
    assert (first.folder / name).read_bytes() == content
    assert [path.name for path in first.folder.parent.iterdir()] == [first.fingerprint]


def test_damaged_tokens_are_not_used_when_the_corpus_is_gone(tmp_path: Path, bpe: str) -> None:
    corpus = make_corpus(tmp_path, make_texts(40))
    path = prepare(corpus, bpe, tmp_path / "cache").train_path
    path.write_bytes(flipped(path.read_bytes()))
    (tmp_path / "corpus.jsonl").unlink()
    with pytest.raises(CorpusError, match=r"corpus.jsonl"):
        prepare(corpus, bpe, tmp_path / "cache")


def test_a_token_file_that_cannot_be_read_is_named(tmp_path: Path, bpe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus(tmp_path, make_texts(40))
    tokens = prepare(corpus, bpe, tmp_path / "cache")

    def refuse(path: Path, _advance: object) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(token_set, "sha256_file", refuse)
    with pytest.raises(CorpusError, match=r"it cannot be read \(input/output error\)\n  do: .*made anew") as caught:
        prepare(corpus, bpe, tmp_path / "cache")
    assert str(tokens.folder) in caught.value.problem


def test_fingerprint_follows_everything_that_decides_the_tokens(tmp_path: Path, bpe: str) -> None:
    texts = make_texts(40)
    train_tokenizer(make_texts(50, seed=2)[:20], 290).save_pretrained(tmp_path / "other")
    variants: dict[str, tuple[Corpus, str | TrainedTokenizer]] = {
        "base": (make_corpus(tmp_path / "a", texts), bpe),
        "text": (make_corpus(tmp_path / "b", [*texts[:-1], "another"]), bpe),
        "ratio": (make_corpus(tmp_path / "a", texts, validation_ratio=0.3), bpe),
        "max_tokens": (make_corpus(tmp_path / "a", texts, max_tokens=700), bpe),
        "dtype": (make_corpus(tmp_path / "a", texts, token_dtype="uint32"), bpe),
        "tokenizer": (make_corpus(tmp_path / "a", texts), str(tmp_path / "other")),
        "trained": (make_corpus(tmp_path / "a", texts), TRAINED),
        "trained on": (make_corpus(tmp_path / "a", texts), TrainedTokenizer(vocab_size=301)),
    }
    found = {name: prepare(*variant, tmp_path / "cache").fingerprint for name, variant in variants.items()}
    assert len(set(found.values())) == len(variants), found


def test_fingerprint_does_not_follow_places_and_names(tmp_path: Path, bpe: str) -> None:
    load_tokenizer(bpe).save_pretrained(tmp_path / "copy")
    here = prepare(make_corpus(tmp_path / "a", make_texts(40)), bpe, tmp_path / "cache")
    there = prepare(make_corpus(tmp_path / "b", make_texts(40)), str(tmp_path / "copy"), tmp_path / "cache")
    assert there == here


def test_fingerprint_follows_the_library_that_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus(tmp_path, make_texts(40))
    first = prepare(corpus, TRAINED, tmp_path / "cache")
    monkeypatch.setattr(tokenize, "version", lambda _name: "99.0")
    assert prepare(corpus, TRAINED, tmp_path / "cache").fingerprint != first.fingerprint
    assert first.manifest["tokenizer"]["train"] == 300


def test_prepare_trains_a_tokenizer_without_the_held_out_documents(tmp_path: Path) -> None:
    texts = [*make_texts(60), *(f"zyzzyva {number} zyzzyva zyzzyva" for number in range(200))]
    texts = [text for text in texts if held_out(text, 0.2) == text.startswith("zyzzyva")]
    tokens = prepare(make_corpus(tmp_path, texts), TRAINED, tmp_path / "cache")
    tokenizer = load_tokenizer(str(tokens.tokenizer_dir))
    assert tokens.vocab_size == len(tokenizer) <= 300
    assert len(tokenizer(" zyzzyva")["input_ids"]) == 8
    assert len(tokenizer(" cat")["input_ids"]) == 1


@pytest.mark.parametrize("max_tokens", [1, 50, 333])
@pytest.mark.parametrize("batch_documents", [1, 7, 512])
def test_prepare_stops_exactly_at_max_tokens(
    tmp_path: Path, bpe: str, monkeypatch: pytest.MonkeyPatch, max_tokens: int, batch_documents: int
) -> None:
    texts = sorted(make_texts(60), key=lambda text: not held_out(text, 0.2))
    everything = prepare(make_corpus(tmp_path, texts), bpe, tmp_path / "cache")
    monkeypatch.setattr(tokenize, "_BATCH_DOCUMENTS", batch_documents)
    some = prepare(make_corpus(tmp_path, texts, max_tokens=max_tokens), bpe, tmp_path / f"cache{batch_documents}")
    assert some.train_tokens == max_tokens
    assert tokens_in(some.train_path, some) == tokens_in(everything.train_path, everything)[:max_tokens]
    assert some.validation_tokens == everything.validation_tokens


def test_prepare_opens_no_source_after_the_last_wanted_token(
    tmp_path: Path, bpe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = make_corpus(tmp_path, make_texts(60), max_tokens=700)
    later = make_corpus(tmp_path / "later", make_texts(60, seed=9)).sources
    corpus = corpus.model_copy(update={"sources": [*corpus.sources, *later]})
    opened = []
    documents = sources.documents

    def spy(source: FilesSource) -> Iterator[str]:
        opened.append(source.paths[0])
        return documents(source)

    monkeypatch.setattr(sources, "documents", spy)
    tokens = prepare(corpus, bpe, tmp_path / "cache")
    assert opened == corpus.sources[0].paths  # type: ignore[union-attr]
    assert tokens.manifest["sources"][1]["documents"] == 0


def test_prepare_reads_sources_in_their_order(tmp_path: Path, bpe: str) -> None:
    first, second = make_corpus(tmp_path / "a", make_texts(30)), make_corpus(tmp_path / "b", make_texts(30, seed=5))
    both = first.model_copy(update={"sources": [*first.sources, *second.sources]})
    joined = prepare(both, bpe, tmp_path / "cache")
    parts = [prepare(corpus, bpe, tmp_path / "cache") for corpus in (first, second)]
    expected = [token for part in parts for token in tokens_in(part.train_path, part)]
    assert tokens_in(joined.train_path, joined) == expected
    assert [count["train_tokens"] for count in joined.manifest["sources"]] == [part.train_tokens for part in parts]


def test_prepare_takes_the_integer_type_asked_for(tmp_path: Path, bpe: str) -> None:
    small = prepare(make_corpus(tmp_path, make_texts(40)), bpe, tmp_path / "cache")
    large = prepare(make_corpus(tmp_path, make_texts(40), token_dtype="uint32"), bpe, tmp_path / "cache")
    assert (small.token_dtype, large.token_dtype) == ("uint16", "uint32")
    assert large.train_path.stat().st_size == 4 * large.train_tokens
    assert tokens_in(large.train_path, large) == tokens_in(small.train_path, small)


@pytest.mark.parametrize(("extra", "dtype"), [(65_535, "uint16"), (65_536, "uint32")])
def test_prepare_takes_the_smallest_type_that_holds_the_largest_id(tmp_path: Path, extra: int, dtype: str) -> None:
    folder = word_level(tmp_path / "words", {"<|endoftext|>": 0, "cat": 1, "dog": extra})
    tokens = prepare(make_corpus(tmp_path, make_texts(40)), folder, tmp_path / "cache")
    assert tokens.token_dtype == dtype
    assert extra in tokens_in(tokens.train_path, tokens)


def word_level(folder: Path, vocabulary: dict[str, int], *, ends_itself: bool = False, eos: bool = True) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="cat"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends_itself:
        backend.post_processor = processors.TemplateProcessing(
            single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
        )
    family: Any = PreTrainedTokenizerFast
    family(tokenizer_object=backend, **({"eos_token": "<|endoftext|>"} if eos else {})).save_pretrained(folder)
    return str(folder)


def test_prepare_ends_each_document_once_when_the_tokenizer_ends_it_too(tmp_path: Path) -> None:
    vocabulary = {"<|endoftext|>": 0, "cat": 1, "dog": 2}
    plain = word_level(tmp_path / "plain", vocabulary)
    ending = word_level(tmp_path / "ending", vocabulary, ends_itself=True)
    first, second = (
        prepare(make_corpus(tmp_path, make_texts(40)), name, tmp_path / "cache") for name in (plain, ending)
    )
    assert first.fingerprint != second.fingerprint
    assert tokens_in(first.train_path, first) == tokens_in(second.train_path, second)
    assert tokens_in(first.train_path, first).count(0) == first.train_documents
    assert second.manifest["document_form"] == "text <|endoftext|>"


def test_vocab_size_counts_the_gaps_between_ids(tmp_path: Path) -> None:
    tokenizer = word_level(tmp_path / "gaps", {"<|endoftext|>": 0, "cat": 1, "dog": 99})
    assert prepare(make_corpus(tmp_path, make_texts(40)), tokenizer, tmp_path / "cache").vocab_size == 100


@pytest.mark.parametrize("tokenizer", ["gpt2", "llama"])
def test_prepare_counts_what_the_real_tokenizer_counts(
    tmp_path: Path, shared: Path, tokenizer_folder: Callable[..., str], tokenizer: str
) -> None:
    import gzip

    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

    with gzip.open(shared / "corpora" / "openwebtext_1000.jsonl.gz", "rt", encoding="utf-8") as stream:
        texts = [json.loads(next(stream))["text"] for _ in range(60)]
    folder = shared / "tokenizers" / tokenizer
    corpus = make_corpus(tmp_path, texts)
    if tokenizer == "gpt2":
        tokens = prepare(corpus, tokenizer_folder(tokenizer__json="gpt2/tokenizer.json"), tmp_path / "cache")
        backend: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        counts = [len(backend.encode(text).ids) + 1 for text in texts]
    else:
        tokens = prepare(corpus, tokenizer_folder(tokenizer__model="llama/tokenizer.model"), tmp_path / "cache")
        processor: Any = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        counts = [len(processor.encode(text)) + 2 for text in texts]
        assert tokens.manifest["document_form"] == "<s> text </s>"
        assert tokens_in(tokens.train_path, tokens)[0] == 1
    assert tokens.train_tokens + tokens.validation_tokens == sum(counts)
    held = sum(count for text, count in zip(texts, counts, strict=True) if held_out(text, 0.2))
    assert tokens.validation_tokens == held
    assert tokens_in(tokens.train_path, tokens)[-1] == tokens.eos_id


def test_prepare_makes_tokens_of_the_embedded_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Corpus(sources=[EmbeddedSource(kind="embedded")], validation_ratio=0.1)
    tokens = prepare(corpus, TrainedTokenizer(vocab_size=4096), tmp_path)
    assert tokens.vocab_size == 4096
    assert 300_000 < tokens.train_tokens < 1_500_000
    assert tokens.manifest["sources"][0]["unparsed_files"] == 0
    monkeypatch.setattr(tokenize, "_build", lambda *_: pytest.fail("built twice"))
    assert prepare(corpus, TrainedTokenizer(vocab_size=4096), tmp_path) == tokens


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_prepare_leaves_nothing_when_it_is_stopped_in_the_middle(
    tmp_path: Path, bpe: str, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    corpus = make_corpus(tmp_path, make_texts(40))

    def documents(_source: object) -> Iterator[str]:
        yield from make_texts(20)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(sources, "documents", documents)
        patch.setattr(tokenize, "_BATCH_DOCUMENTS", 4)
        with pytest.raises(error):
            prepare(corpus, bpe, tmp_path / "cache")
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []
    assert prepare(corpus, bpe, tmp_path / "cache").train_tokens > 0


def test_prepare_says_that_a_file_grew_too_large(tmp_path: Path, bpe: str) -> None:
    """The operating system's own refusal in the middle of writing, as from a full disk."""
    corpus = make_corpus(tmp_path, make_texts(4000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"train\.bin cannot be written: File too large"):
            prepare(corpus, bpe, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_prepare_names_a_cache_that_cannot_be_written(tmp_path: Path, bpe: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"(?s)file.* cannot be written: Not a directory"):
        prepare(make_corpus(tmp_path, make_texts(40)), bpe, tmp_path / "file" / "cache")


@pytest.mark.parametrize("kind", ["named", "trained"])
def test_prepare_refuses_ids_that_do_not_fit_before_reading(tmp_path: Path, kind: str) -> None:
    corpus = make_corpus(tmp_path, make_texts(4), token_dtype="uint16")
    folder = word_level(tmp_path / "words", {"<|endoftext|>": 0, "cat": 1, "dog": 70_000})
    tokenizer = folder if kind == "named" else TrainedTokenizer(vocab_size=70_001)
    message = r"(?s)token_dtype uint16 holds 65,536 ids, and the vocabulary has 70,001.*corpus\.token_dtype=auto"
    with pytest.raises(CorpusError, match=message):
        prepare(corpus, tokenizer, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_prepare_needs_a_token_that_ends_texts(tmp_path: Path, tokenizer_folder: Callable[..., str]) -> None:
    folder = tokenizer_folder(tokenizer__json="llama/tokenizer.json")
    message = r'(?s)has no eos_token\).*<unk>, <s>, </s>.*tokenizer_config\.json with \{"eos_token": "\.\.\."\}'
    with pytest.raises(CorpusError, match=message):
        prepare(make_corpus(tmp_path, make_texts(4)), folder, tmp_path / "cache")
    (Path(folder) / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert prepare(make_corpus(tmp_path, make_texts(40)), folder, tmp_path / "cache").eos_id == 2


def test_prepare_says_that_no_special_token_is_declared(tmp_path: Path) -> None:
    folder = word_level(tmp_path / "words", {"cat": 0, "dog": 1}, eos=False)
    with pytest.raises(CorpusError, match="one of its special tokens: none is declared"):
        prepare(make_corpus(tmp_path, make_texts(4)), folder, tmp_path / "cache")


@pytest.mark.parametrize(
    ("texts", "ratio", "message"),
    [
        (["", " "], 0.2, r"(?s)no document with text in it \(2 empty ones were skipped\).*paths and text_field"),
        ([], 0.2, "no document with text in it"),
        (make_texts(5), 0.999, r"(?s)training part is empty: all 5 documents were held out.*lower corpus\.valid"),
        (make_texts(5), 1e-9, r"(?s)validation part is empty: none of 5 documents.*raise corpus\.validation_ratio"),
    ],
)
def test_prepare_says_which_key_leaves_a_part_empty(
    tmp_path: Path, bpe: str, texts: list[str], ratio: float, message: str
) -> None:
    with pytest.raises(CorpusError, match=message):
        prepare(make_corpus(tmp_path, texts, validation_ratio=ratio), bpe, tmp_path / "cache")
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_prepare_says_that_max_tokens_left_no_document_to_validate_on(tmp_path: Path, bpe: str) -> None:
    corpus = make_corpus(tmp_path, make_texts(60), validation_ratio=0.01, max_tokens=10)
    with pytest.raises(CorpusError, match=r"raise corpus\.validation_ratio or corpus\.max_tokens, or give more"):
        prepare(corpus, bpe, tmp_path / "cache")
