"""Tokenizers: loaded by name, or trained on the corpus; always a `tokenizers` backend taken word for word.

`AutoTokenizer` is not enough for that. For a folder with `tokenizer.model` alone, transformers 5.23
orders the merges by id and not by score, which changes the ids of every run of spaces (LLaMA:
"a  b"); and its family classes rebuild the backend and leave out the file's normalizer.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from inheritune_ds import hub
from inheritune_ds.errors import CorpusError
from inheritune_ds.recipe_base import is_local_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
_FILES = ["tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"]
_SETTINGS = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"]
_TRAINING_BATCH = 1000
_SPACE = "▁"
_PROBES = (
    "  The thermal  ﬁlm,\tcafé:\n\n    def f(x):  return x**2  # 12345 €, 東京 \U0001f600\u00a0end  ",
    "\n\t x \n",
)


def load_tokenizer(name: str, revision: str = "main") -> "PreTrainedTokenizerBase":
    """Load a tokenizer from the hub or a folder, without running code that comes with it.

    Read is the first of `tokenizer.json` (taken as it stands), `tokenizer.model` (SentencePiece
    BPE, with the same ids as SentencePiece gives), `vocab.json` with `merges.txt` (GPT-2's kind,
    if no `tokenizer_config.json` or `config.json` says otherwise). Special tokens come from
    `tokenizer_config.json`. A bare `tokenizer.json` does not say which token ends a text: if
    `<|endoftext|>` is its only special token (GPT-2), that one does.

    Args:
        name: Hub id or local folder.
        revision: Hub only: commit, tag or branch.

    Raises:
        CorpusError: The folder is missing, or holds no tokenizer that can be read.
        HubError: The hub cannot be reached or has no such repository.
    """
    folder = _find_folder(name, revision)
    try:
        tokenizer = _from_folder(folder, name)
    except CorpusError:
        raise
    except Exception as error:  # noqa: BLE001  every reader of these formats has error classes of its own
        raise CorpusError(
            f"tokenizer {name!r}: its files cannot be read ({type(error).__name__}: {hub.first_line(error)})",
            allowed="a Hugging Face tokenizer folder",
            action="copy or download the folder again",
        ) from None
    if not tokenizer.is_fast:
        raise CorpusError(
            f"tokenizer {name!r} is a {type(tokenizer).__name__}, which has no `tokenizers` backend",
            allowed="a tokenizer that can be saved as tokenizer.json",
            action="choose another tokenizer, or convert it to tokenizer.json",
        )
    return cast("PreTrainedTokenizerBase", tokenizer)


def sentencepiece_model(name: str, revision: str = "main") -> bytes | None:
    """Return the SentencePiece model of a tokenizer that `load_tokenizer` has loaded; None if it has none.

    Args:
        name: Hub id or local folder.
        revision: Hub only.

    Raises:
        CorpusError: The folder is missing.
        HubError: The hub cannot be reached.
    """
    from sentencepiece import SentencePieceProcessor

    file = _find_folder(name, revision) / "tokenizer.model"
    if not file.is_file():
        return None
    model = file.read_bytes()
    processor: Any = SentencePieceProcessor
    try:
        processor(model_proto=model)
    except RuntimeError:  # some families give this name to a file of another kind, such as tiktoken's
        return None
    return model or None


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerBase":
    """Train a byte-level BPE; `<|endoftext|>` (id 0) begins and ends texts, nothing is unknown.

    Args:
        texts: The documents to learn merges from.
        vocab_size: Entries, the end-of-text token and the 256 bytes among them; a small corpus may
            give fewer.
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
    return cast("PreTrainedTokenizerBase", _wrap(backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT))


def backend_of(tokenizer: "PreTrainedTokenizerBase") -> Any:
    """Return the `tokenizers.Tokenizer` inside, without truncation and padding."""
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined, unused-ignore]
    backend.no_truncation()
    backend.no_padding()
    return backend


def tokenizer_sha256(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash (hex) of all that decides the ids of a text: the serialised backend and the eos token."""
    canonical = json.dumps([json.loads(backend_of(tokenizer).to_str()), tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _find_folder(name: str, revision: str) -> Path:
    if is_local_path(name) or Path(name).is_dir():
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise CorpusError(
                f"tokenizer {name!r} is written as a path, and there is no such folder",
                allowed="a local folder, or a hub id such as openai-community/gpt2",
                action="correct corpus.tokenizer (or reference.model, whose tokenizer is taken without it)",
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
        return _from_sentencepiece(folder, name)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        described = any((folder / name).is_file() for name in ("tokenizer_config.json", "config.json"))
        family: Any = AutoTokenizer if described else GPT2Tokenizer
        return family.from_pretrained(folder, **({"trust_remote_code": False} if described else {}))
    raise CorpusError(
        f"tokenizer {name!r}: {folder} holds none of the files of a tokenizer",
        allowed="tokenizer.json, or tokenizer.model (SentencePiece), or vocab.json with merges.txt",
        action="name another folder or hub id, or copy these files into it",
    )


def _from_sentencepiece(folder: Path, name: str) -> Any:
    """Rebuild a SentencePiece BPE model; merges are ranked by the score of what they make."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    model = (folder / "tokenizer.model").read_bytes()
    proto = _parse_sentencepiece(model)
    settings = _read_settings(folder)
    _check_kind(proto, name)
    pieces = [piece.piece for piece in proto.pieces]
    kinds = proto.SentencePiece.Type
    special = {piece.piece: piece.type for piece in proto.pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN)}
    unknown = pieces[proto.trainer_spec.unk_id]
    backend = Tokenizer(
        models.BPE(
            {piece: number for number, piece in enumerate(pieces)},
            _merges(proto),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    backend.normalizer = _normalizer(proto.normalizer_spec)
    strip = [decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    backend.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    _check_ids(backend, model, name)
    bos, eos = (
        _special(settings, key, pieces, number)
        for key, number in (("bos_token", proto.trainer_spec.bos_id), ("eos_token", proto.trainer_spec.eos_id))
    )
    if bos is not None and settings.get("add_bos_token", True):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, pieces.index(bos))]
        )
    limit = {"model_max_length": settings["model_max_length"]} if "model_max_length" in settings else {}
    return _wrap(backend, bos_token=bos, eos_token=eos, unk_token=unknown, **limit)


def _wrap(backend: Any, **settings: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    family: Any = PreTrainedTokenizerFast
    return family(tokenizer_object=backend, clean_up_tokenization_spaces=False, **settings)


def _parse_sentencepiece(model: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2
    proto = messages.ModelProto()
    proto.ParseFromString(model)
    return proto


def _read_settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _check_kind(proto: Any, name: str) -> None:
    """Refuse models that are not merges of pieces."""
    differences = {
        "is no BPE model": proto.trainer_spec.model_type != proto.trainer_spec.BPE,
        "has user-defined pieces": any(piece.type == proto.SentencePiece.USER_DEFINED for piece in proto.pieces),
    }
    found = [what for what, is_so in differences.items() if is_so]
    if found:
        raise CorpusError(
            f"tokenizer {name!r}: tokenizer.model {' and '.join(found)}, which is not read",
            allowed="tokenizer.json, or a SentencePiece BPE model without user-defined pieces (LLaMA's kind)",
            action="convert it to tokenizer.json, and compare ids with SentencePiece's",
        )


def _normalizer(spec: Any) -> Any:
    """Rebuild what SentencePiece does to a text before it looks for pieces."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        # Spaces only: SentencePiece keeps line ends at the edges, which Strip would take.
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _check_ids(backend: Any, model: bytes, name: str) -> None:
    """Compare ids with SentencePiece's own on a text with everything that was ever read wrongly."""
    from sentencepiece import SentencePieceProcessor

    processor: Any = SentencePieceProcessor(model_proto=model)
    for text in _PROBES:
        expected, found = processor.encode(text), backend.encode(text, add_special_tokens=False).ids
        if found != expected:
            raise CorpusError(
                f"tokenizer {name!r}: tokenizer.model was rebuilt, but its ids differ from SentencePiece's "
                f"on {text!r}: {found} against {expected}",
                action="convert it to tokenizer.json, and compare ids with SentencePiece's",
            )


def _merges(proto: Any) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, best score first, then by the length of the left part.

    SentencePiece takes the leftmost pair of those with the same score. Merges have a rank each; with the longest
    left part first a run of one character grows from its left end, as there: Mistral's model, whose runs of spaces
    all have the same score, needs that (18 spaces are 16 + 1 and one in front of the word, not 14 + 3).
    """
    ids = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    ranked = []
    for piece in proto.pieces:
        if piece.type == proto.SentencePiece.NORMAL:
            cuts = ((piece.piece[:cut], piece.piece[cut:]) for cut in range(1, len(piece.piece)))
            ranked += [
                (-piece.score, -len(left), ids[left], left, right)
                for left, right in cuts
                if left in ids and right in ids
            ]
    return [(left, right) for *_, left, right in sorted(ranked)]


def _special(settings: dict[str, Any], key: str, pieces: list[str], number: int) -> str | None:
    """Name of a special token: the settings' (a string or an object), else the model's own."""
    given = settings.get(key)
    token = given.get("content") if isinstance(given, dict) else given
    if token in pieces:
        return str(token)
    return pieces[number] if 0 <= number < len(pieces) else None
