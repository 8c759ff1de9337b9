# ruff: noqa: RUF001  characters that are easily confused are what these tests are about
import gzip
import json
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from inheritune_ds.data.tokens import safe_cuts
from inheritune_ds.data.tokens.encoder import Continued, TextEncoder
from inheritune_ds.data.tokens.tokenizer import backend_of, load_tokenizer
from inheritune_ds.errors import CorpusError

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QUOTES = r'"[^"]*"|\w+|\s+|[^\w\s"]+|"'
WORDS = random.Random(4)
TEXTS = [
    " ".join(
        "".join(WORDS.choices("abcdeéß", k=WORDS.randint(1, 5))) + WORDS.choice(["", ",", "\n"]) for _ in range(30)
    )
    + " 2024 it's 12345 — «né»  东京都，东京。\n\n\tx"
    for _ in range(40)
]


def train(split: Any, *, byte_level: bool, normalizer: Any = None, space: str = "▁") -> Tokenizer:
    """Train a small BPE, byte-level or LLaMA's kind."""
    backend = Tokenizer(
        models.BPE(byte_fallback=not byte_level, fuse_unk=True, unk_token=None if byte_level else "<unk>")
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if byte_level else [f"<0x{n:02X}>" for n in range(256)]
    special = ["<|end|>"] if byte_level else ["<unk>", "<s>", "</s>", *alphabet]
    # SentencePiece's pieces begin at spaces: learnt with a split there, used without.
    backend.pre_tokenizer = split if byte_level else pre_tokenizers.Metaspace(space)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special,
        initial_alphabet=alphabet if byte_level else [space],
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    if byte_level:
        backend.pre_tokenizer, backend.normalizer, backend.decoder = split, normalizer, decoders.ByteLevel()
        return backend
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.normalizer, backend.pre_tokenizer = normalizer, split
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
SPACES = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
SQUEEZE = [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]


def isolated(pattern: str) -> pre_tokenizers.Sequence:
    """A split at a pattern, then bytes."""
    bytes_behind = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_behind])


BYTE_LEVEL: dict[str, tuple[Any, Any]] = {
    "gpt2": (PLAIN, None),
    "gpt2 prefix": (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
    "llama3": (isolated(LLAMA_3), None),
    "digits": (pre_tokenizers.Sequence([DIGITS, PLAIN]), None),
    "qwen": (isolated(LLAMA_3.replace("{1,3}", "")), normalizers.NFC()),
    "quotes": (isolated(QUOTES), None),
}
"""Split and normalizer."""
LLAMA_S_KIND: dict[str, tuple[Any, Any]] = {
    "llama": (None, normalizers.Sequence(SPACES)),
    "llama squeezing": (None, normalizers.Sequence([normalizers.NFKC(), *SQUEEZE, *SPACES])),
    "metaspace": (pre_tokenizers.Metaspace("▁"), None),
    "metaspace unsplit": (pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False), None),
}
KINDS = [kind for kind in (*BYTE_LEVEL, *LLAMA_S_KIND) if kind != "quotes"]


@cache
def backend_for(kind: str) -> str:
    split, normalizer = (BYTE_LEVEL | LLAMA_S_KIND)[kind]
    return str(train(split, byte_level=kind in BYTE_LEVEL, normalizer=normalizer).to_str())


def eos_of(kind: str) -> int:
    return 0 if kind in BYTE_LEVEL else 2


def whole(encoder: TextEncoder, text: str) -> list[int]:
    ids: list[int] = encoder.backend.encode(text, add_special_tokens=False).ids
    return ids


def by_pieces(encoder: TextEncoder, text: str) -> list[int]:
    pieces = encoder.pieces(text)
    assert "".join(pieces) == text
    ids: list[int] = np.concatenate(encoder.encode(pieces)).tolist()
    return ids


def fragments() -> st.SearchStrategy[str]:
    """Texts with all that may be at a cut, and many words."""
    special = ["<|end|>", "</s>", "<s>", "▁", "'s", "’s", "'LL", "\r\n", "\n", "  ", "\t", "\u00a0"]
    special += ["ﷺ", "ﬁ", "ͺ", "e\u0301", "\u0301", " ", " ", " "]
    words = ["abc", "bcd", "dé", "ea", "7", "2024", ",", ".", "东京", "，", "한국"]
    return st.lists(st.sampled_from(special + words) | st.text(max_size=3), max_size=60).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(text=fragments(), size=st.integers(1, 12))
@example(text="abc ͺ bcd ﷺ abc e\u0301 \u0301 abc\n\u0301 bcd ▁abc ▁ bcd", size=1)
def test_pieces_have_the_ids_of_the_whole(kind: str, text: str, size: int) -> None:
    encoder = encoder_of(kind, size)
    before = encoder.forced_cuts
    assert by_pieces(encoder, text) == whole(encoder, text)
    assert encoder.forced_cuts == before


@cache
def encoder_of(kind: str, size: int) -> TextEncoder:
    return TextEncoder(backend_for(kind), eos_of(kind), piece_characters=size)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_about_as_long_as_wanted(kind: str) -> None:
    pieces = encoder_of(kind, 10).pieces(" ".join(TEXTS))
    assert sum(map(len, pieces[:-1])) / len(pieces[:-1]) < 16
    assert min(map(len, pieces[:-1])) >= 10
    assert not isinstance(pieces[0], Continued)
    assert all(isinstance(piece, Continued) for piece in pieces[1:])


def test_text_without_a_safe_place_is_cut_at_the_limit_and_counted() -> None:
    encoder = TextEncoder(backend_for("gpt2"), 0, piece_characters=8, max_piece_characters=32)
    text = "é" * 100
    assert [len(piece) for piece in encoder.pieces(text)] == [32, 32, 32, 4]
    assert encoder.forced_cuts == 3
    assert encoder.backend.decode(by_pieces(encoder, text)) == text
    assert encoder.pieces("é" * 30) == ["é" * 30], "the remainder is within the limit"


def test_a_forced_cut_adds_no_space() -> None:
    encoder = TextEncoder(backend_for("llama"), 2, piece_characters=8, max_piece_characters=32)
    text = "abab" * 25
    assert encoder.backend.decode(by_pieces(encoder, text)) == " " + text
    assert encoder.forced_cuts > 0


def test_cuts_of_an_unknown_split_are_at_words_and_all_counted() -> None:
    """The window around a cut cannot show that a quotation continues: such a cut is not proven."""
    encoder = TextEncoder(backend_for("quotes"), 0, piece_characters=8, max_piece_characters=400)
    text = '"' + "abc bcd " * 100 + '"'
    pieces = encoder.pieces(text)
    assert encoder.forced_cuts == len(pieces) - 1 == 3
    assert all(piece.startswith(" ") for piece in pieces[1:])
    assert encoder.backend.decode(by_pieces(encoder, text)) == text


def test_a_tokenizer_with_stripping_tokens_has_no_proven_cuts() -> None:
    backend = Tokenizer.from_str(backend_for("gpt2"))
    assert isinstance(safe_cuts.rule_of(json.loads(backend.to_str())), safe_cuts.WordEnds)
    backend.add_tokens([AddedToken("abc", rstrip=True)])
    assert safe_cuts.rule_of(json.loads(backend.to_str())) is None


@given(text=st.lists(st.sampled_from(["abc bcd", "abc", " ", "bcd", "e", "de\nea", "\n"]), max_size=40).map("".join))
def test_no_cut_is_made_inside_an_added_token(text: str) -> None:
    backend = Tokenizer.from_str(backend_for("gpt2"))
    backend.add_tokens([AddedToken("abc bcd", normalized=False), AddedToken("de\nea", normalized=True)])
    encoder = TextEncoder(backend.to_str(), 0, piece_characters=2)
    assert by_pieces(encoder, text) == whole(encoder, text)
    assert encoder.forced_cuts == 0


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_spelled_special_token_is_text(kind: str) -> None:
    encoder = encoder_of(kind, 10_000)
    text = "abc<|end|>bcd</s><s><unk>"
    document = encoder.document(encoder.encode(encoder.pieces(text)))
    assert document.tolist().count(encoder.eos_id) == 1
    assert document[-1] == encoder.eos_id
    assert encoder.backend.decode(document[len(encoder.front) : -1].tolist()).lstrip() == text


def test_the_end_of_text_is_not_read_even_if_it_is_declared_an_ordinary_added_token() -> None:
    spec = json.loads(backend_for("gpt2"))
    spec["added_tokens"][0]["special"] = False
    encoder = TextEncoder(json.dumps(spec), 0)
    assert 0 not in whole(encoder, "abc <|end|> bcd")


@pytest.mark.parametrize(
    ("template", "front", "back"),
    [("<s> $A", [1], []), ("<s> $A </s>", [1], []), ("$A </s>", [], []), ("$A <s>", [], [1]), ("$A", [], [])],
)
def test_document_follows_the_template_and_ends_once(template: str, front: list[int], back: list[int]) -> None:
    backend = Tokenizer.from_str(backend_for("llama"))
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    encoder = TextEncoder(backend.to_str(), 2)
    assert (encoder.front, encoder.back) == (front, back)
    text = " ".join(TEXTS[:3])
    document = encoder.document(encoder.encode(encoder.pieces(text))).tolist()
    expected = backend.encode(text).ids
    assert document == (expected if expected[-1] == 2 else [*expected, 2])


def test_a_template_that_repeats_the_text_is_refused() -> None:
    backend = Tokenizer.from_str(backend_for("llama"))
    backend.post_processor = processors.TemplateProcessing(single="$A <s> $A", special_tokens=[("<s>", 1)])
    with pytest.raises(
        CorpusError, match=r"(?s)template turns .* into \[.*allowed: a template that adds.*post_processor"
    ):
        TextEncoder(backend.to_str(), 2)


def test_pieces_of_many_documents_are_encoded_in_their_order() -> None:
    encoder = encoder_of("llama", 20)
    texts = [*TEXTS[:10], "", "abc", *TEXTS[10:20]]
    cut = [encoder.pieces(text) for text in texts]
    encoded = iter(encoder.encode([piece for pieces in cut for piece in pieces]))
    for text, pieces in zip(texts, cut, strict=True):
        assert np.concatenate([next(encoded) for _ in pieces]).tolist() == whole(encoder, text)
    assert encoder.encode([]) == []


def test_pieces_travel_between_processes() -> None:
    pieces = encoder_of("llama", 20).pieces(TEXTS[0])
    again = pickle.loads(pickle.dumps(pieces))
    assert [(type(piece), piece) for piece in again] == [(type(piece), piece) for piece in pieces]


def test_importing_needs_no_torch() -> None:
    script = (
        "import sys, inheritune_ds.data.tokens.encoder; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("family", ["gpt2/tokenizer.json", "llama/tokenizer.model", "mistral-v1/tokenizer.model"])
def test_books_have_the_same_ids_whole_and_in_pieces(
    tokenizer_folder: Callable[..., str], shared: Path, family: str
) -> None:
    tokenizer = load_tokenizer(tokenizer_folder(**{Path(family).name.replace(".", "__"): family}))
    with gzip.open(shared / "corpora" / "books" / "books-00-of-04.jsonl.gz", "rt") as lines:
        book = json.loads(next(lines))["text"]
    backend, eos = backend_of(tokenizer).to_str(), tokenizer.eos_token_id
    assert eos is not None
    expected = whole(TextEncoder(backend, eos), book)
    for size in (300, 2**14):
        encoder = TextEncoder(backend, eos, piece_characters=size)
        assert len(encoder.pieces(book)) > len(book) // (size + 30)
        assert by_pieces(encoder, book) == expected
        assert encoder.forced_cuts == 0


def with_special_entries(kind: str) -> Tokenizer:
    """A tokenizer whose model has its special tokens as entries."""
    special = ["<unk>", "<s>", "</s>"]
    texts = [f"a river, a hill and {number} small boats" for number in range(50)]
    if kind == "unigram":
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False
        )
        backend.train_from_iterator(texts, trainer)
    elif kind == "wordlevel":
        backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    elif kind == "wordpiece":
        words = [*special, "a", "river", "<", "/", "s", ">", "##a", "##s", "##/", "##>"]
        backend = Tokenizer(models.WordPiece({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:  # merges that form the token
        letters = [*special, "a", "<", "/", "s", ">", "</", "s>"]
        merges = [("<", "/"), ("s", ">"), ("</", "s>")]
        vocabulary = {piece: at for at, piece in enumerate(letters)}
        backend = Tokenizer(
            models.BPE(vocabulary, merges, unk_token="<unk>", ignore_merges=kind == "bpe with ignore_merges")
        )
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(special)
    return backend


@pytest.mark.parametrize("kind", ["unigram", "wordlevel", "wordpiece", "bpe", "bpe with ignore_merges"])
@pytest.mark.parametrize("text", ["a </s> a", "</s>", "a </s></s> <s> a"])
def test_text_that_spells_a_special_token_never_gives_its_id(kind: str, text: str) -> None:
    encoder = TextEncoder(with_special_entries(kind).to_str(), 2)
    ids = encoder.document(encoder.encode(encoder.pieces(text))).tolist()
    assert (ids.count(2), ids[-1]) == (1, 2)
    assert 1 not in ids
    assert ids[0] == encoder.encode(["a"])[0].tolist()[0] or not text.startswith("a")


@pytest.mark.parametrize("kind", ["unigram", "wordlevel", "wordpiece"])
def test_text_without_special_tokens_keeps_the_tokenizer_s_ids(kind: str) -> None:
    backend, text = with_special_entries(kind), "a river, a hill and 7 small boats"
    assert TextEncoder(backend.to_str(), 2).encode([text])[0].tolist() == backend.encode(text).ids


def test_an_end_of_text_that_is_part_of_other_entries_is_refused_where_the_text_has_it() -> None:
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "abb": 3}, [("a", "b"), ("ab", "b")]))
    encoder = TextEncoder(backend.to_str(), 2)
    assert encoder.document(encoder.encode(["aabb"])).tolist() == [0, 3, 2]
    with pytest.raises(CorpusError, match=r"(?s)turns into its end-of-text id 2\n.*another eos_token"):
        encoder.document(encoder.encode(["aba"]))
