"""Encodes documents of any length in bounded memory: long ones are cut into pieces.

The ids are those of the whole document. `safe_cuts` proves which cuts change nothing, and for which tokenizers.
Other cuts are counted as `forced_cuts`: no such place within `MAX_PIECE_CHARACTERS` (a million letters without a
space or mark), or a tokenizer of an unknown kind. A forced cut is at the end of a word if possible; all text is kept,
and only the few tokens at the cut may differ.
"""

import json
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from inheritune_ds.data.tokens import safe_cuts
from inheritune_ds.errors import CorpusError

Ids = npt.NDArray[np.uint32]

PIECE_CHARACTERS = 2**14
"""A longer document is cut at the first safe place behind this position; larger pieces are slower."""
MAX_PIECE_CHARACTERS = 2**20
"""Longest piece; it bounds the memory, most of which `tokenizers` uses."""

_BATCH_CHARACTERS = 2**16
_TRIES = 1000
"""Places to check before a cut is forced."""
_PROBE = "a text"


class Continued(str):
    """A later piece of a document: the tokenizer adds nothing in front of it."""

    __slots__ = ()


class TextEncoder:
    """Encodes documents; another process can create it from the same arguments.

    The text of a special token inside a document is ordinary text, as in tiktoken's `encode_ordinary` and
    SentencePiece: the end-of-text id is at the ends of documents only. No special token but the unknown one is an
    entry that the model can find in a text (`_without_control_pieces`). The tokenizer's template adds the ids `front`
    before a document ([1] for LLaMA) and `back` behind it; a CorpusError is raised if it adds tokens inside the text.
    `forced_cuts` counts the cuts not proven to keep the ids.
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
            token["special"] |= token["id"] == eos_id  # otherwise the text of a document could contain its end
        spec = _without_control_pieces(spec)
        later = safe_cuts.continued(spec)
        self.backend = _backend(spec)
        self.eos_id = eos_id
        self.forced_cuts = 0
        self.front, self.back = _template(self.backend, eos_id)
        self._later = _backend(later) if later != spec else self.backend
        self._rule = safe_cuts.rule_of(spec)
        self._max = max_piece_characters
        # Without a proven rule every cut may change ids: use few large pieces.
        self._wanted = piece_characters if self._rule else max_piece_characters // 2
        normalizer = self._later.normalizer
        self._seams = safe_cuts.Seams(
            normalize=str if normalizer is None else normalizer.normalize_str,
            encode=lambda text: list(self._later.encode(text, add_special_tokens=False).ids),
            added=(token["content"] for token in spec["added_tokens"] if not token["special"]),
        )

    def pieces(self, text: str) -> list[str]:
        """Cut a document into pieces, which join to the text; a short document is one piece."""
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
        """Return the ids of each piece without the template's; a plain string is the first piece of its document."""
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
        """Join the ids of a document's pieces and add the template's ids and the end of text.

        Raises a CorpusError if the text gives the end-of-text id, which only a piece of other entries still does.
        """
        if any((ids == self.eos_id).any() for ids in pieces):
            raise CorpusError(
                f"a document contains text that the tokenizer turns into its end-of-text id {self.eos_id}",
                allowed="an eos_token that is no part of other entries of the vocabulary",
                action="choose another eos_token in tokenizer_config.json, or another tokenizer",
            )
        front, end = np.array(self.front, np.uint32), np.array([*self.back, self.eos_id], np.uint32)
        return np.concatenate([front, *pieces, end])

    def _cut(self, text: str, start: int) -> int:
        """Return the end of the piece that begins at `start`."""
        first, last = start + self._wanted, min(start + self._max, len(text))
        places = (self._rule or safe_cuts.WordEnds()).candidates(text, first, last)
        cut = next((place for place in islice(places, _TRIES) if self._seams.holds(self._rule, text, place)), last)
        found = cut < last
        if cut < len(text) and not (found and self._rule):
            self.forced_cuts += 1
        return cut


def _without_control_pieces(spec: dict[str, Any]) -> dict[str, Any]:
    """Rename the special tokens among the model's entries, so that it cannot find them in a text; ids stay.

    `encode_special_tokens` only stops the search for added tokens. Unigram and WordLevel then find the same text in
    their vocabulary, and so does a BPE with `ignore_merges` or with merges that form it. SentencePiece never matches
    its control pieces.
    """
    model = spec["model"]
    vocabulary = model["vocab"]
    entries = [entry for entry, _ in vocabulary] if isinstance(vocabulary, list) else list(vocabulary)
    merges = model.get("merges", [])
    unknown = {model.get("unk_token")} | {entries[at] for at in [model.get("unk_id")] if at is not None}
    special = {token["content"] for token in spec["added_tokens"] if token["special"]}
    renamed = special & {*entries} - unknown - {part for merge in merges for part in merge}
    if not renamed:
        return spec
    names = {entry: f"\0{entry}\0" if entry in renamed else entry for entry in entries}
    if isinstance(vocabulary, list):
        model = {**model, "vocab": [[names[entry], score] for entry, score in vocabulary]}
    else:
        model = {**model, "vocab": {names[entry]: number for entry, number in vocabulary.items()}}
    if merges:
        model["merges"] = [merge for merge in merges if "".join(merge) not in renamed]
    return {
        **spec,
        "model": model,
        "added_tokens": [token for token in spec["added_tokens"] if token["content"] not in renamed],
    }


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
    """Return the ids before and behind a text, without the end of text."""
    bare, whole = backend.encode(_PROBE, add_special_tokens=False).ids, backend.encode(_PROBE).ids
    mask = backend.encode(_PROBE).special_tokens_mask
    first = mask.index(0) if 0 in mask else len(mask)
    front, back = whole[:first], whole[first + len(bare) :]
    if [*front, *bare, *back] != whole:
        raise CorpusError(
            f"the tokenizer's template turns {_PROBE!r} with the ids {bare} into {whole}",
            allowed="a template that adds tokens before or behind a text, such as `<s> $A`",
            action="correct post_processor in its tokenizer.json",
        )
    return list(front), list(back[:-1] if back[-1:] == [eos_id] else back)
