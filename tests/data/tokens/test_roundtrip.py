import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from inheritune_ds.data.tokens import roundtrip
from inheritune_ds.data.tokens.encoder import TextEncoder
from inheritune_ds.data.tokens.roundtrip import Fidelity, check_fidelity
from inheritune_ds.data.tokens.tokenizer import backend_of, load_tokenizer, sentencepiece_model, train_tokenizer
from inheritune_ds.errors import CorpusError

TRICKY = "Hello  world\n\n   x = 1\t# café 東京 \U0001f600\u00a0 the thermal ﬁlm \0 <s> ▁ "


def encoder_of(backend: Tokenizer, eos_id: int = 0) -> TextEncoder:
    return TextEncoder(backend.to_str(), eos_id)


def trained() -> Tokenizer:
    backend: Tokenizer = backend_of(train_tokenizer(["the cat sat on the mat"] * 5, 300))
    return backend


def llama(folder: Path) -> TextEncoder:
    return encoder_of(backend_of(load_tokenizer(str(folder))), 2)


def test_a_byte_level_tokenizer_gives_everything_back() -> None:
    found = check_fidelity(encoder_of(trained()), [TRICKY, "", "the cat"], None)
    assert found == Fidelity(documents=3, exact=3)
    assert found.warning == ""


def test_fidelity_distinguishes_normalization_from_loss() -> None:
    backend = trained()
    backend.normalizer = normalizers.NFC()
    found = check_fidelity(encoder_of(backend), ["cafe\u0301", "café"], None)
    assert (found.exact, found.normalized, found.lossy, found.warning) == (1, 1, 0, "")


def test_a_wrong_decoder_is_a_loss_and_the_first_place_is_shown() -> None:
    backend = trained()
    backend.decoder = decoders.Fuse()
    found = check_fidelity(encoder_of(backend), ["mat", "the first difference", "the cat"], None)
    assert (found.documents, found.exact, found.lossy) == (3, 1, 2)
    assert found.warning == (
        "the tokenizer does not reproduce texts: 2 of 3 sample documents are decoded differently; "
        "the first: 'the first difference' is decoded as 'theĠfirstĠdifference'"
    )


def test_unknown_words_are_counted() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "cat": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = check_fidelity(encoder_of(backend, 2), ["the cat", "the dog saw the cow"], None)
    assert (found.exact, found.lossy, found.unknown_tokens) == (1, 1, 3)
    assert "1 of 2 sample documents are decoded differently (3 unknown tokens)" in found.warning


def test_documents_are_read_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roundtrip, "SAMPLE_CHARACTERS", 7)
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "cat": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = check_fidelity(encoder_of(backend, 2), iter(["the cat and more"]), None)
    assert (found.exact, found.unknown_tokens) == (1, 0)


def real_documents(shared: Path) -> Iterator[str]:
    yield TRICKY
    for name, count in (("redpajama_arxiv_sample", 4), ("openwebtext_1000", 20)):
        with gzip.open(shared / "corpora" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            yield from (json.loads(next(lines))["text"] for _ in range(count))


@pytest.mark.parametrize("files", ["mistral-v1/tokenizer.model", "llama/tokenizer.model", "llama/tokenizer.json"])
def test_real_documents_have_the_ids_of_sentencepiece(
    tokenizer_folder: Callable[..., str], shared: Path, files: str
) -> None:
    """ArXiv's tables have long runs of spaces: Mistral's all have the same score."""
    folder = tokenizer_folder(**{Path(files).name.replace(".", "__"): files})
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == 32_000
    if files.endswith(".model"):
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    model = sentencepiece_model(str(shared / "tokenizers" / Path(files).parent))
    assert model is not None
    found = check_fidelity(llama(Path(folder)), real_documents(shared), model)
    assert (found.documents, found.compared_with_sentencepiece, found.exact, found.normalized) == (25, 25, 24, 1)


def test_ids_that_differ_from_sentencepiece_are_refused(
    tokenizer_folder: Callable[..., str], shared: Path, tmp_path: Path
) -> None:
    """As in transformers issue 24233: a converted tokenizer without one of its merges."""
    folder = Path(tokenizer_folder(tokenizer__json="llama/tokenizer.json"))
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    wanted = spec["model"]["vocab"]["▁thermal"]
    spec["model"]["merges"] = [
        merge for merge in spec["model"]["merges"] if "".join(merge).replace(" ", "") != "▁thermal"
    ]
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    model = (shared / "tokenizers" / "llama" / "tokenizer.model").read_bytes()
    check_fidelity(llama(folder), ["nothing of the kind"], model)
    with pytest.raises(CorpusError) as raised:
        check_fidelity(llama(folder), ["nothing of the kind", "as for " + "the thermal " * 2 + "film"], model)
    message = str(raised.value)
    assert (
        "are not those of the tokenizer.model beside it: at 'as for the thermal the thermal fil' it gives [" in message
    )
    assert f"SentencePiece gives [363, 278, {wanted}, 278, {wanted}, 2706]" in message
    assert "do: remove tokenizer.json from the tokenizer's folder" in message


def test_sentencepiece_model_is_found_beside_a_tokenizer(tokenizer_folder: Callable[..., str], shared: Path) -> None:
    both = tokenizer_folder(tokenizer__json="llama/tokenizer.json", tokenizer__model="llama/tokenizer.model")
    assert sentencepiece_model(both) == (shared / "tokenizers" / "llama" / "tokenizer.model").read_bytes()
    assert sentencepiece_model(tokenizer_folder(tokenizer__json="gpt2/tokenizer.json")) is None


@pytest.mark.parametrize("content", [b"IQ== 0\nIg== 1\n", b"", b"\x00\x01"])
def test_sentencepiece_model_ignores_other_formats(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    assert sentencepiece_model(str(tmp_path)) is None
