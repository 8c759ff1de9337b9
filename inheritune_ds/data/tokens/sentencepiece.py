"""Builds a fast tokenizer from a SentencePiece model and checks its ids against the original."""

import json
from pathlib import Path
from typing import Any

from inheritune_ds.errors import CorpusError

_SPACE = "▁"
_PROBES = (
    "  The thermal  ﬁlm,\tcafé:\n\n    def f(x):  return x**2  # 12345 €, 東京 \U0001f600\u00a0end  ",
    "\n\t x \n",
)


def from_sentencepiece(folder: Path, name: str) -> Any:
    """Rebuild a SentencePiece BPE model; merges are ranked by the score of their result."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    model = (folder / "tokenizer.model").read_bytes()
    messages: Any = sentencepiece_model_pb2
    proto = messages.ModelProto()
    proto.ParseFromString(model)
    settings = {**read_object(folder / "special_tokens_map.json"), **read_object(folder / "tokenizer_config.json")}
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
    pieces += _add_tokens(backend, len(pieces), _added_tokens(folder, settings, pieces), name)
    spec = proto.trainer_spec
    bos, eos, pad = (
        _special(settings, key, pieces, number, name)
        for key, number in (("bos_token", spec.bos_id), ("eos_token", spec.eos_id), ("pad_token", spec.pad_id))
    )
    if bos is not None and settings.get("add_bos_token", True):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, pieces.index(bos))]
        )
    limit = {"model_max_length": settings["model_max_length"]} if "model_max_length" in settings else {}
    return wrap(backend, bos_token=bos, eos_token=eos, unk_token=unknown, pad_token=pad, **limit)


def wrap(backend: Any, **settings: Any) -> Any:
    """A transformers tokenizer around a `tokenizers` backend."""
    from transformers import PreTrainedTokenizerFast

    family: Any = PreTrainedTokenizerFast
    return family(tokenizer_object=backend, clean_up_tokenization_spaces=False, **settings)


def _check_kind(proto: Any, name: str) -> None:
    """Refuse models other than BPE, or with user-defined pieces."""
    differences = {
        "is not a BPE model": proto.trainer_spec.model_type != proto.trainer_spec.BPE,
        "has user-defined pieces": any(piece.type == proto.SentencePiece.USER_DEFINED for piece in proto.pieces),
    }
    found = [difference for difference, is_present in differences.items() if is_present]
    if found:
        raise CorpusError(
            f"tokenizer {name!r}: tokenizer.model {' and '.join(found)}, which is not supported",
            allowed="tokenizer.json, or a SentencePiece BPE model without user-defined pieces (LLaMA's kind)",
            action="convert it to tokenizer.json, and compare ids with SentencePiece's",
        )


def _normalizer(spec: Any) -> Any:
    """Rebuild SentencePiece's normalization."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        # Spaces only: SentencePiece keeps line ends at the edges, which Strip would remove.
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _check_ids(backend: Any, model: bytes, name: str) -> None:
    """Compare ids with SentencePiece's own on a text with all known sources of errors."""
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
    """All pairs of pieces that form a piece, best score first, then longest left part first.

    SentencePiece merges the leftmost of pairs with the same score. Merges have unique ranks; with the longest left part
    first a run of one character grows from its left end, as in SentencePiece: Mistral's model, with the same score for
    all runs of spaces, needs this (18 spaces are 16 + 1 and one in front of the word, not 14 + 3).
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


def read_object(path: Path) -> dict[str, Any]:
    """Read the entries of a JSON object that are not null; empty without the file."""
    if not path.is_file():
        return {}
    return {key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if value is not None}


def _added_tokens(folder: Path, settings: dict[str, Any], pieces: list[str]) -> dict[str, int]:
    """Ids of the tokens that slow tokenizers of transformers 4 keep beside the model, without those of the model."""
    listed = settings.get("added_tokens_decoder", {})
    added = {token["content"]: int(number) for number, token in listed.items()} | read_object(
        folder / "added_tokens.json"
    )
    return {token: number for token, number in added.items() if pieces[number : number + 1] != [token]}


def _add_tokens(backend: Any, size: int, added: dict[str, int], name: str) -> list[str]:
    """Add tokens behind the model's pieces; return them in the order of their ids."""
    from tokenizers import AddedToken

    tokens = sorted(added, key=added.__getitem__)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])
    found = {token: backend.token_to_id(token) for token in tokens}
    if found != added:
        raise CorpusError(
            f"tokenizer {name!r}: its added tokens have the ids {sorted(added.values())}, which do not follow the "
            f"{size} pieces of tokenizer.model",
            allowed=f"new tokens with the ids {size}, {size + 1}, ... in added_tokens.json or added_tokens_decoder",
            action="convert it to tokenizer.json, and compare ids with SentencePiece's",
        )
    return tokens


def _special(settings: dict[str, Any], key: str, pieces: list[str], number: int, name: str) -> str | None:
    """Name of a special token: from the settings (a string or an object), otherwise from the model."""
    given = settings.get(key)
    token = given.get("content") if isinstance(given, dict) else given
    if token is None:
        return pieces[number] if 0 <= number < len(pieces) else None
    if token not in pieces:
        raise no_such_token(name, key, token)
    return str(token)


def no_such_token(name: str, key: str, token: str) -> CorpusError:
    """The error for a special token that is in no vocabulary."""
    return CorpusError(
        f"tokenizer {name!r}: its {key} {token!r} is neither in its vocabulary nor among its added tokens",
        allowed="a token of tokenizer.json, tokenizer.model, vocab.json, added_tokens.json or added_tokens_decoder",
        action=f"copy the missing file into the folder, or correct {key} in tokenizer_config.json",
    )
