"""Token ids of documents of any length in bounded memory: a long one is encoded in pieces.

The ids are those of the whole document. Where a cut is proven to change nothing, and for which
tokenizers, stands in `cuts`. Two cases are left, and both are counted as `forced_cuts`: no such
place within `MAX_PIECE_CHARACTERS` (a million letters without a space or mark, a million times the
same character), and a tokenizer that is neither of the known kinds. Such a cut is made at the end
of a word if there is one. The text is still whole: only the few tokens at the cut may differ.
"""

import json
from collections.abc import Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from inheritune_ds.data.tokens import safe_cuts
from inheritune_ds.errors import CorpusError

Ids = npt.NDArray[np.uint32]

PIECE_CHARACTERS = 2**14
"""A longer document is cut at the first safe place behind this many; larger pieces are slower, not better."""
MAX_PIECE_CHARACTERS = 2**20
"""No piece is longer, whatever the text: bounds the memory, most of it `tokenizers`' own."""

_BATCH_CHARACTERS = 2**16
_TRIES = 1000
"""Places to look at closely before a cut is forced."""
_PROBE = "a text"


class Continued(str):
    """A piece that is not the first of its document: the tokenizer puts nothing in front of it."""

    __slots__ = ()


class TextEncoder:
    """Encodes documents; cheap to make in another process from the same arguments.

    A special token that is spelled out in a document is text like any other, as for tiktoken's
    `encode_ordinary` and SentencePiece: the end-of-text id stands at the ends of documents only.

    Args:
        tokenizer_json: What `Tokenizer.to_str()` gives.
        eos_id: The token that ends a document.
        piece_characters: Documents up to this length are one piece.
        max_piece_characters: No piece is longer.

    Attributes:
        backend: The tokenizer; without truncation and padding.
        front: Ids that the tokenizer's template puts before a document ([1] for LLaMA).
        back: Ids that it puts behind one, the end of text left out.
        forced_cuts: Cuts so far that are not proven to leave the ids as they are.

    Raises:
        CorpusError: The template puts its tokens elsewhere than around the text.
    """

    def __init__(
        self,
        tokenizer_json: str,
        eos_id: int,
        *,
        piece_characters: int = PIECE_CHARACTERS,
        max_piece_characters: int = MAX_PIECE_CHARACTERS,
    ) -> None:
        spec = json.loads(tokenizer_json)
        for token in spec["added_tokens"]:
            token["special"] |= token["id"] == eos_id  # else a document could spell its own end
        later = safe_cuts.continued(spec)
        self.backend = _backend(spec)
        self.eos_id = eos_id
        self.forced_cuts = 0
        self.front, self.back = _template(self.backend, eos_id)
        self._later = _backend(later) if later != spec else self.backend
        self._rule = safe_cuts.rule_of(spec)
        self._max = max_piece_characters
        # Without a proven rule every cut may cost something: few and large pieces.
        self._wanted = piece_characters if self._rule else max_piece_characters // 2
        self._seams = safe_cuts.Seams(
            normalize=self._normalize,
            encode=lambda text: list(self._later.encode(text, add_special_tokens=False).ids),
            added=(token["content"] for token in spec["added_tokens"] if not token["special"]),
        )

    def pieces(self, text: str) -> list[str]:
        """Cut a document; its parts, joined, are the text. A short one is its own only piece."""
        pieces: list[str] = []
        start = 0
        while len(text) - start > self._wanted:
            cut = self._cut(text, start)
            if cut == len(text):
                break
            pieces.append(Continued(text[start:cut]) if start else text[start:cut])
            start = cut
        return [*pieces, Continued(text[start:]) if start else text]

    def encode(self, pieces: Sequence[str]) -> list[Ids]:
        """Return the ids of each piece, of one document or of many, nothing around them.

        Args:
            pieces: As `pieces` gives them; a plain string is the first piece of its document.
        """
        encoded: list[Ids] = []
        batch: list[str] = []
        backend, characters = self.backend, 0
        for piece in pieces:
            needed = self._later if isinstance(piece, Continued) else self.backend
            if needed is not backend or characters + len(piece) > _BATCH_CHARACTERS:
                encoded += _encode_batch(backend, batch)
                batch, characters = [], 0
            backend = needed
            batch.append(piece)
            characters += len(piece)
        return encoded + _encode_batch(backend, batch)

    def document(self, pieces: Sequence[Ids]) -> Ids:
        """Join the ids of a document's pieces: the template's around them, then the end of text."""
        front, end = np.array(self.front, np.uint32), np.array([*self.back, self.eos_id], np.uint32)
        return np.concatenate([front, *pieces, end])

    def _cut(self, text: str, start: int) -> int:
        """Return the end of the piece that begins at `start`; that of the text if it is not cut."""
        first, last = start + self._wanted, min(start + self._max, len(text))
        places = (self._rule.candidates if self._rule else safe_cuts.word_ends)(text, first, last)
        cut = next((place for place in islice(places, _TRIES) if self._seams.holds(self._rule, text, place)), last)
        found = cut < last
        if cut < len(text) and not (found and self._rule):
            self.forced_cuts += 1
        return cut

    def _normalize(self, text: str) -> str:
        normalizer = self._later.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))


def _backend(spec: dict[str, object]) -> Tokenizer:
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def _encode_batch(backend: Tokenizer, batch: list[str]) -> list[Ids]:
    encodings = backend.encode_batch_fast(batch, add_special_tokens=False)
    return [np.array(encoding.ids, np.uint32) for encoding in encodings]


def _template(backend: Tokenizer, eos_id: int) -> tuple[list[int], list[int]]:
    """Return what stands before and behind a text, the end of text left out."""
    bare, whole = backend.encode(_PROBE, add_special_tokens=False).ids, backend.encode(_PROBE).ids
    mask = backend.encode(_PROBE).special_tokens_mask
    first = mask.index(0) if 0 in mask else len(mask)
    front, back = whole[:first], whole[first + len(bare) :]
    if [*front, *bare, *back] != whole:
        raise CorpusError(
            f"the tokenizer's template makes {whole} of {_PROBE!r}, whose own ids are {bare}",
            allowed="a template that puts tokens in front of a text or behind it, such as `<s> $A`",
            action="correct post_processor in its tokenizer.json",
        )
    return list(front), list(back[:-1] if back[-1:] == [eos_id] else back)
