import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers

from inheritune_ds.data.tokens import sentencepiece
from inheritune_ds.data.tokens import tokenizer as vocabulary
from inheritune_ds.data.tokens.tokenizer import (
    END_OF_TEXT,
    backend_of,
    load_tokenizer,
    tokenizer_sha256,
    train_tokenizer,
)
from inheritune_ds.errors import CorpusError, HubError
from inheritune_ds.storage import hub

TRICKY = "Hello  world\n\n   x = 1\t# café 東京 \U0001f600\u00a0 the thermal ﬁlm "
TEXTS = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog"] * 5


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def sentencepiece_ids(model: Path, text: str) -> list[int]:
    from sentencepiece import SentencePieceProcessor

    processor: Any = SentencePieceProcessor(model_file=str(model))
    ids: list[int] = processor.encode(text)
    return ids


def test_train_tokenizer_learns_words_and_reads_everything_back() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.eos_token_id) == (END_OF_TEXT, END_OF_TEXT, 0)
    assert tokenizer.unk_token is None
    assert 257 < len(tokenizer) <= 300
    assert len(train_tokenizer(TEXTS, 257)) == 257
    assert len(ids_of(tokenizer, " cat")) == 1
    for text in ("the cat", TRICKY, " \r\n\0"):
        assert backend_of(tokenizer).decode(ids_of(tokenizer, text)) == text


def test_train_tokenizer_gives_the_same_in_every_process() -> None:
    # Enough distinct words that an order taken from hash tables would show.
    script = (
        "import random\n"
        "from inheritune_ds.data.tokens.tokenizer import *\n"
        "words = random.Random(1)\n"
        "texts = [' '.join(''.join(words.choices('abcdefgh', k=4)) for _ in range(100)) for _ in range(50)]\n"
        "print(tokenizer_sha256(train_tokenizer(texts, 600)))\n"
    )
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    words = random.Random(1)
    texts = [" ".join("".join(words.choices("abcdefgh", k=4)) for _ in range(100)) for _ in range(50)]
    assert tokenizer_sha256(train_tokenizer(texts, 600)) == there


def test_trained_tokenizer_survives_saving(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.save_pretrained(tmp_path)
    ours, plain = load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    for again in (ours, plain):
        assert ids_of(again, TRICKY) == ids_of(tokenizer, TRICKY)
        assert again.eos_token == END_OF_TEXT
    assert tokenizer_sha256(ours) == tokenizer_sha256(tokenizer)


def test_tokenizer_sha256_differs_between_tokenizers() -> None:
    first, second = train_tokenizer(TEXTS, 300), train_tokenizer(TEXTS, 270)
    assert tokenizer_sha256(first) != tokenizer_sha256(second)
    before = tokenizer_sha256(first)
    first.eos_token = None
    assert tokenizer_sha256(first) != before


def test_tokenizer_sha256_does_not_depend_on_truncation() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    before = tokenizer_sha256(tokenizer)
    tokenizer("the cat", truncation=True, max_length=2)
    assert tokenizer_sha256(tokenizer) == before
    assert len(backend_of(tokenizer).encode("the cat sat on").ids) > 2


def test_load_tokenizer_finds_the_end_of_text_of_a_bare_gpt2_file(tokenizer_folder: Callable[..., str]) -> None:
    tokenizer = load_tokenizer(tokenizer_folder(tokenizer__json="gpt2/tokenizer.json"))
    assert (tokenizer.eos_token_id, len(tokenizer)) == (50256, 50257)
    assert ids_of(tokenizer, "Hello world") == [15496, 995]


def test_load_tokenizer_reads_vocab_and_merges_as_gpt2(tokenizer_folder: Callable[..., str], shared: Path) -> None:
    bare = load_tokenizer(tokenizer_folder(vocab__json="gpt2/encoder.json", merges__txt="gpt2/vocab.bpe"))
    one_file = load_tokenizer(tokenizer_folder(tokenizer__json="gpt2/tokenizer.json"))
    text = (shared / "corpora" / "tinystories_sample.txt").read_text(encoding="utf-8") + TRICKY
    assert ids_of(bare, text) == ids_of(one_file, text)
    assert bare.eos_token_id == 50256


def test_load_tokenizer_reads_a_described_vocab_with_its_family(tokenizer_folder: Callable[..., str]) -> None:
    folder = tokenizer_folder(vocab__json="gpt2/encoder.json", merges__txt="gpt2/vocab.bpe")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "!"}
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(folder).eos_token == "!"


def test_load_tokenizer_gives_llama_one_tokenizer_from_both_of_its_files(tokenizer_folder: Callable[..., str]) -> None:
    from_model = load_tokenizer(tokenizer_folder(tokenizer__model="llama/tokenizer.model"))
    from_json = load_tokenizer(tokenizer_folder(tokenizer__json="llama/tokenizer.json"))
    assert ids_of(from_model, TRICKY) == ids_of(from_json, TRICKY)
    # A run of spaces: transformers' own conversion of tokenizer.model gives 259, 11526 here.
    assert ids_of(from_model, "Hello  world") == [1, 15043, 29871, 3186]
    assert from_model.decode(ids_of(from_model, TRICKY), skip_special_tokens=True) == TRICKY


def test_loaded_sentencepiece_tokenizer_survives_saving_beside_a_model(
    tokenizer_folder: Callable[..., str], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(tokenizer_folder(tokenizer__model="llama/tokenizer.model"))
    saved = tmp_path / "saved"
    tokenizer.save_pretrained(saved)
    (saved / "config.json").write_text('{"model_type": "llama"}')
    again = AutoTokenizer.from_pretrained(saved)
    assert ids_of(again, TRICKY) == ids_of(tokenizer, TRICKY)
    assert (again.bos_token, again.eos_token) == ("<s>", "</s>")


def test_load_tokenizer_follows_the_settings_beside_a_sentencepiece_model(
    tokenizer_folder: Callable[..., str],
) -> None:
    folder = Path(tokenizer_folder(tokenizer__model="llama/tokenizer.model"))
    settings = {"add_bos_token": False, "eos_token": {"content": "<s>"}, "bos_token": None, "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(folder))
    assert ids_of(tokenizer, "Hello") == [15043]
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<s>", 77)


def train_sentencepiece(folder: Path, **settings: Any) -> str:
    from sentencepiece import SentencePieceTrainer

    words = random.Random(3)
    text = folder / "text.txt"
    text.write_text("\n".join(" ".join("".join(words.choices("abcdeé", k=3)) for _ in range(9)) for _ in range(300)))
    trainer: Any = SentencePieceTrainer
    given = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 400, "minloglevel": 2, **settings}
    trainer.train(input=str(text), model_prefix=str(folder / "tokenizer"), **given)
    return str(folder)


@pytest.mark.parametrize("rule", ["nmt_nfkc", "identity"])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("squeeze", [True, False])
def test_load_tokenizer_normalizes_as_sentencepiece_does(
    tmp_path: Path, rule: str, *, prefix: bool, squeeze: bool
) -> None:
    """OpenLLaMA's tokenizer normalizes and squeezes spaces, LLaMA's does neither."""
    folder = train_sentencepiece(
        tmp_path, normalization_rule_name=rule, add_dummy_prefix=prefix, remove_extra_whitespaces=squeeze
    )
    tokenizer = load_tokenizer(folder)
    for text in (TRICKY, "abc  bcd", "  ", "", "\n", " \n a \n "):
        expected = sentencepiece_ids(tmp_path / "tokenizer.model", text)
        assert backend_of(tokenizer).encode(text, add_special_tokens=False).ids == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "unigram"}, "is not a BPE model, which is not supported"),
        ({"user_defined_symbols": ["<sep>"]}, "has user-defined pieces, which is not supported"),
    ],
)
def test_load_tokenizer_refuses_other_kinds_of_sentencepiece(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(CorpusError, match=message):
        load_tokenizer(train_sentencepiece(tmp_path, **settings))


def test_load_tokenizer_refuses_ids_that_differ_from_sentencepiece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train_sentencepiece(tmp_path)
    monkeypatch.setattr(sentencepiece, "_normalizer", lambda _spec: normalizers.Replace(" ", "▁"))
    with pytest.raises(CorpusError, match=r"(?s)its ids differ from SentencePiece's on '  The.*convert it"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, r"(?s)has no tokenizer files.*tokenizer\.json, or"),
        ({"tokenizer.json": '{"version": "1.0"'}, r"(?s)its files cannot be read \(\w+: .*download the folder again"),
        (None, r"(?s)folder' is a path, but the folder does not exist.*corpus\.tok"),
    ],
)
def test_load_tokenizer_refuses_a_folder_without_a_tokenizer(
    tmp_path: Path, content: dict[str, str] | None, message: str
) -> None:
    folder = tmp_path / "folder"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(CorpusError, match=message):
        load_tokenizer(str(folder))


def test_load_tokenizer_needs_a_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        is_fast = False

    monkeypatch.setattr(vocabulary, "_from_folder", lambda _folder, _name: Slow())
    with pytest.raises(CorpusError, match="is a Slow without a `tokenizers` backend"):
        load_tokenizer(str(tmp_path))


def test_load_tokenizer_reads_a_hub_name_through_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_tokenizer(TEXTS, 300).save_pretrained(tmp_path)
    asked: list[object] = []

    def resolve(name: str, revision: str, kind: hub.RepoType) -> hub.Repository:
        asked.append((name, revision, kind))
        return hub.Repository(name, kind, "0" * 40, "")

    monkeypatch.setattr(hub, "resolve", resolve)
    monkeypatch.setattr(hub, "snapshot", lambda _repository, _patterns: tmp_path)
    assert load_tokenizer("some/thing", "v1").eos_token == END_OF_TEXT
    assert asked == [("some/thing", "v1", "model")]


def test_load_tokenizer_lets_a_hub_error_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: object) -> None:
        raise HubError("no network")

    monkeypatch.setattr(hub, "resolve", resolve)
    with pytest.raises(HubError, match="no network"):
        load_tokenizer("some/thing")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        (
            "tokenizer.json",
            b"version https://git-lfs.github.com/spec/v1\noid",
            "a Git LFS pointer, not the file itself",
        ),
        ("tokenizer_config.json", b"<!doctype html>\n<html>", "an HTML page"),
        ("tokenizer.json", "{}".encode("utf-16"), "UTF-16 text"),
        ("special_tokens_map.json", '{"eos_token": "a"}'.encode("utf-8-sig"), "text with a byte order mark"),
        ("tokenizer.json", b"", "empty"),
    ],
)
def test_a_tokenizer_file_of_another_kind_is_named(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    train_tokenizer(TEXTS, 300).save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError) as caught:
        load_tokenizer(str(tmp_path))
    assert caught.value.problem == f"tokenizer {str(tmp_path)!r}: {tmp_path / name} is {what}"
    assert caught.value.action


def test_a_tiktoken_vocabulary_is_named_unless_there_is_a_tokenizer_json(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(CorpusError, match=r"tokenizer\.model is a tiktoken vocabulary"):
        load_tokenizer(str(tmp_path))
    train_tokenizer(TEXTS, 300).save_pretrained(tmp_path)
    assert len(load_tokenizer(str(tmp_path))) <= 300


SLOW: list[tuple[dict[str, Any], tuple[str, int, int]]] = [
    # what slow tokenizers of transformers 4 save: files beside the model -> eos, its id, entries
    (
        {"added_tokens": {"<pad>": 400, "<|im_end|>": 401}, "tokenizer_config": {"eos_token": "<|im_end|>"}},
        ("<|im_end|>", 401, 402),
    ),
    (
        {
            "tokenizer_config": {
                "added_tokens_decoder": {"2": {"content": "</s>"}, "400": {"content": "<|end|>"}},
                "eos_token": {"content": "<|end|>"},
            }
        },
        ("<|end|>", 400, 401),
    ),
    (
        {"added_tokens": {"[END]": 400}, "special_tokens_map": {"eos_token": "[END]"}, "tokenizer_config": {}},
        ("[END]", 400, 401),
    ),
    ({"added_tokens": {"<pad>": 400}, "tokenizer_config": {"eos_token": None}}, ("</s>", 2, 401)),
    ({"added_tokens": {"</s>": 2}, "tokenizer_config": {"eos_token": "</s>"}}, ("</s>", 2, 400)),
]


def write_json(folder: str, files: dict[str, Any]) -> None:
    for name, content in files.items():
        Path(folder, f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize(("files", "expected"), SLOW)
def test_load_tokenizer_reads_the_tokens_added_to_a_sentencepiece_model(
    files: dict[str, Any], expected: tuple[str, int, int], tmp_path: Path
) -> None:
    folder = train_sentencepiece(tmp_path)
    write_json(folder, files)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, len(tokenizer)) == expected
    assert tokenizer.convert_ids_to_tokens(expected[1]) == expected[0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, "its eos_token '<|im_end|>' is neither in its vocabulary"),
        ({"tokenizer_config": {"bos_token": {"content": "<b>"}}}, "its bos_token '<b>' is neither in its vocabulary"),
        ({"tokenizer_config": {"pad_token": "<pad>"}}, "its pad_token '<pad>' is neither in its vocabulary"),
        ({"special_tokens_map": {"eos_token": "<e>"}}, "its eos_token '<e>' is neither in its vocabulary"),
        (
            {"added_tokens": {"<pad>": 402}},
            r"its added tokens have the ids \[402\], which do not follow the 400 pieces",
        ),
        ({"added_tokens": {"<e>": 7}}, r"its added tokens have the ids \[7\], which do not follow the 400 pieces"),
    ],
)
def test_load_tokenizer_refuses_special_tokens_that_a_sentencepiece_folder_lacks(
    files: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = train_sentencepiece(tmp_path)
    write_json(folder, files)
    with pytest.raises(CorpusError, match=message.replace("<|", r"<\|").replace("|>", r"\|>")):
        load_tokenizer(folder)


@pytest.mark.parametrize("key", ["eos_token", "bos_token"])
@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.json"])
def test_load_tokenizer_refuses_a_special_token_that_no_file_lists(kind: str, key: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    if kind == "tokenizer.json":
        tokenizer.save_pretrained(tmp_path)
    else:
        backend_of(tokenizer).model.save(str(tmp_path))
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    write_json(str(tmp_path), {"tokenizer_config": settings})
    assert load_tokenizer(str(tmp_path)).eos_token == END_OF_TEXT
    write_json(str(tmp_path), {"tokenizer_config": {**settings, key: "<|im_end|>"}})
    with pytest.raises(
        CorpusError, match=rf"its {key} '<\|im_end\|>' is neither in its vocabulary nor among its added"
    ):
        load_tokenizer(str(tmp_path))
