"""Checks a tokenizer on a sample of the documents, before anything is written.

Byte-level and byte-fallback tokenizers reproduce every text, decode(encode(x)) == x, up to their own normalizer. The
ids of a tokenizer with a SentencePiece model must be SentencePiece's: converted ones have differed silently
(transformers issue 24233: the model knows "thermal" as one token, the converted tokenizer made two of it).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, cast

import numpy as np

from inheritune_ds.data.tokens.encoder import TextEncoder
from inheritune_ds.errors import CorpusError

SAMPLE_CHARACTERS = 2**16
"""Of each document; long enough for several pieces."""

_SHOWN = 24


@dataclass
class Fidelity:
    """Counts of sample documents by their text after encoding and decoding.

    `normalized` ones differ only by the tokenizer's own normalizer (other spaces, composed accents).
    """

    documents: int = 0
    exact: int = 0
    normalized: int = 0
    lossy: int = 0
    unknown_tokens: int = 0
    first_difference: str = ""
    compared_with_sentencepiece: int = 0

    @property
    def warning(self) -> str:
        """The warning for the user; "" if no document is lossy."""
        if not self.lossy:
            return ""
        unknown = f" ({self.unknown_tokens:,} unknown tokens)" if self.unknown_tokens else ""
        return (
            f"the tokenizer does not reproduce texts: {self.lossy:,} of {self.documents:,} sample documents "
            f"are decoded differently{unknown}; the first: {self.first_difference}"
        )


def check_fidelity(encoder: TextEncoder, texts: Iterable[str], sentencepiece_model: bytes | None) -> Fidelity:
    """Check a tokenizer on the first `SAMPLE_CHARACTERS` of each document.

    Raises a CorpusError if its ids are not those of its `sentencepiece_model`.
    """
    from sentencepiece import SentencePieceProcessor

    found, new_processor = Fidelity(), cast("Any", SentencePieceProcessor)
    processor = new_processor(model_proto=sentencepiece_model) if sentencepiece_model is not None else None
    name = getattr(encoder.backend.model, "unk_token", None)
    unknown = encoder.backend.token_to_id(name) if name is not None else None
    for text in texts:
        sample = text[:SAMPLE_CHARACTERS]
        ids = np.concatenate(encoder.encode(encoder.pieces(sample))).tolist()
        if processor is not None:
            _compare(ids, processor.encode(sample), sample, encoder)
            found.compared_with_sentencepiece += 1
        found.documents += 1
        found.unknown_tokens += ids.count(unknown)
        _count(found, encoder, sample, encoder.backend.decode(ids, skip_special_tokens=False))
    return found


def _count(found: Fidelity, encoder: TextEncoder, text: str, back: str) -> None:
    normalizer = encoder.backend.normalizer
    if back == text:
        found.exact += 1
    elif normalizer is not None and normalizer.normalize_str(back) == normalizer.normalize_str(text):
        found.normalized += 1
    else:
        found.lossy += 1
        place = _first_difference(text, back)
        found.first_difference = found.first_difference or (
            f"{_around(text, place)!r} is decoded as {_around(back, place)!r}"
        )


def _compare(ids: list[int], expected: list[int], text: str, encoder: TextEncoder) -> None:
    if ids == expected:
        return
    place = _first_difference(ids, expected)
    before = encoder.backend.decode(expected[:place], skip_special_tokens=False)
    start = max(0, place - 2)
    raise CorpusError(
        f"the tokenizer's ids are not those of the tokenizer.model beside it: at {_around(text, len(before))!r} "
        f"it gives {ids[start : place + 6]}, but SentencePiece gives {expected[start : place + 6]}",
        allowed="the ids that the model was trained with",
        action="remove tokenizer.json from the tokenizer's folder, so that tokenizer.model is read; "
        "or remove tokenizer.model, if the two differ on purpose",
    )


def _first_difference(one: Sequence[object], other: Sequence[object]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _around(text: str, place: int) -> str:
    return text[max(0, place - _SHOWN // 2) : place + _SHOWN]
