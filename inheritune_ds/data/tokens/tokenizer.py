"""Loads, trains and fingerprints tokenizers, and selects the one of a recipe."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from inheritune_ds.config.corpus import TrainedTokenizer
from inheritune_ds.config.fields import is_local_path
from inheritune_ds.config.loading import load_recipe
from inheritune_ds.config.recipe import Recipe
from inheritune_ds.data.tokens.sentencepiece import from_sentencepiece, no_such_token, read_object, wrap
from inheritune_ds.errors import CorpusError, RecipeError
from inheritune_ds.storage import hub
from inheritune_ds.storage.file_kind import FileKind, action_for, unexpected_kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
_FILES = ["tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"]
_SETTINGS = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"]


def load_tokenizer(name: str, revision: str = "main") -> "PreTrainedTokenizerBase":
    """Load a tokenizer from the hub or a folder, without running code that comes with it.

    The first existing one is read: `tokenizer.json` (unchanged), `tokenizer.model` (SentencePiece BPE, with
    SentencePiece's ids), `vocab.json` with `merges.txt` (GPT-2's kind, unless `tokenizer_config.json` or `config.json`
    names another). Special tokens come from `tokenizer_config.json`. A bare `tokenizer.json` does not name the token
    that ends a text: if `<|endoftext|>` is its only special token (GPT-2), it is that one.

    Raises:
        CorpusError: The folder is missing, or has no supported tokenizer.
        HubError: The hub cannot be reached or has no such repository.
    """
    folder = _find_folder(name, revision)
    _check_kinds(folder, name)
    try:
        tokenizer = _from_folder(folder, name)
    except CorpusError:
        raise
    except Exception as error:  # noqa: BLE001  every reader of these formats has its own error classes
        raise CorpusError(
            f"tokenizer {name!r}: its files cannot be read ({type(error).__name__}: {hub.first_line(error)})",
            allowed="a Hugging Face tokenizer folder",
            action="copy or download the folder again",
        ) from None
    if not tokenizer.is_fast:
        raise CorpusError(
            f"tokenizer {name!r} is a {type(tokenizer).__name__} without a `tokenizers` backend",
            allowed="a tokenizer that can be saved as tokenizer.json",
            action="select another tokenizer, or convert it to tokenizer.json",
        )
    _check_special(tokenizer, folder, name)
    return cast("PreTrainedTokenizerBase", tokenizer)


def _check_kinds(folder: Path, name: str) -> None:
    """Refuse tokenizer files that are something else, such as pointers of Git LFS."""
    usual = (FileKind.JSON_OBJECT, FileKind.JSON_LINES, FileKind.JSON_ARRAY, FileKind.SENTENCEPIECE)
    for path in (folder / file for file in (*_FILES, *_SETTINGS)):
        kind = unexpected_kind(path, usual)
        if kind is not None and not (kind is FileKind.TIKTOKEN and (folder / "tokenizer.json").is_file()):
            raise CorpusError(
                f"tokenizer {name!r}: {path} is {kind.value}",
                allowed="tokenizer.json, or tokenizer.model (SentencePiece), or vocab.json with merges.txt",
                action=action_for(kind, path),
            )


def sentencepiece_model(name: str, revision: str = "main") -> bytes | None:
    """The SentencePiece model of a tokenizer; None if it has none. Arguments and errors as for `load_tokenizer`."""
    from sentencepiece import SentencePieceProcessor

    file = _find_folder(name, revision) / "tokenizer.model"
    if not file.is_file():
        return None
    model = file.read_bytes()
    processor: Any = SentencePieceProcessor
    try:
        processor(model_proto=model)
    except RuntimeError:  # some families use this name for another format, such as tiktoken's
        return None
    return model or None


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerBase":
    """Train a byte-level BPE; `<|endoftext|>` (id 0) begins and ends texts, no token is unknown.

    `vocab_size` includes the end-of-text token and the 256 bytes; a small corpus may give fewer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return cast("PreTrainedTokenizerBase", wrap(backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT))


def backend_of(tokenizer: "PreTrainedTokenizerBase") -> Any:
    """Return the inner `tokenizers.Tokenizer`, without truncation and padding."""
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined, unused-ignore]
    backend.no_truncation()
    backend.no_padding()
    return backend


def tokenizer_sha256(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash (hex) of the serialized backend and the eos token, which decide all ids."""
    canonical = json.dumps([json.loads(backend_of(tokenizer).to_str()), tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _find_folder(name: str, revision: str) -> Path:
    if is_local_path(name) or Path(name).is_dir():
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise CorpusError(
                f"tokenizer {name!r} is a path, but the folder does not exist",
                allowed="a local folder, or a hub id such as openai-community/gpt2",
                action="correct corpus.tokenizer (or reference.model, the default tokenizer)",
            )
        return folder
    return hub.snapshot(hub.resolve(name, revision, "model"), _FILES + _SETTINGS)


def _from_folder(folder: Path, name: str) -> Any:
    from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

    if (folder / "tokenizer.json").is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        if tokenizer.eos_token is None and special == [END_OF_TEXT]:
            tokenizer.eos_token = tokenizer.bos_token = END_OF_TEXT
        return tokenizer
    if (folder / "tokenizer.model").is_file():
        return from_sentencepiece(folder, name)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        described = any((folder / name).is_file() for name in ("tokenizer_config.json", "config.json"))
        family: Any = AutoTokenizer if described else GPT2Tokenizer
        return family.from_pretrained(folder, **({"trust_remote_code": False} if described else {}))
    raise CorpusError(
        f"tokenizer {name!r}: {folder} has no tokenizer files",
        allowed="tokenizer.json, or tokenizer.model (SentencePiece), or vocab.json with merges.txt",
        action="use another folder or hub id, or copy these files into it",
    )


def _check_special(tokenizer: Any, folder: Path, name: str) -> None:
    """Refuse a bos or eos token that no file lists: transformers would give it a new id, which no model knows."""
    if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        return  # `from_sentencepiece` has refused it
    listed = set(read_object(folder / "vocab.json")) | set(read_object(folder / "added_tokens.json"))
    whole = read_object(folder / "tokenizer.json")
    if whole:
        vocabulary = whole["model"]["vocab"]
        listed |= {piece for piece, _ in vocabulary} if isinstance(vocabulary, list) else set(vocabulary)
        listed |= {token["content"] for token in whole["added_tokens"]}
    decoder = read_object(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    listed |= {token["content"] for token in decoder.values()}
    for key in ("bos_token", "eos_token"):
        token = getattr(tokenizer, key)
        if token is not None and token not in listed:
            raise no_such_token(name, key, token)


def tokenizer_of(recipe: Recipe, reference: Path | None) -> tuple[str | TrainedTokenizer, str]:
    """Name and revision of the tokenizer: the corpus's own, otherwise the reference's (a folder, if it is available).

    Raises:
        RecipeError: The reference's recipe trains its tokenizer, and the reference is not available.
    """
    if recipe.corpus.tokenizer is not None:
        return recipe.corpus.tokenizer, "main"
    if reference is not None:
        return str(reference), "main"
    assert recipe.reference is not None  # Recipe validates this
    inner = recipe.reference.recipe_name
    if inner is None:
        return recipe.reference.model, recipe.reference.revision
    name, revision = tokenizer_of(load_recipe(inner), None)
    if isinstance(name, TrainedTokenizer):
        raise RecipeError(
            f"recipe {recipe.name} uses the tokenizer of its reference {inner}, which has not been trained yet",
            action=f"train {inner} first (train.py --recipe {inner}), or set corpus.tokenizer",
        )
    return name, revision
