"""Overlap of documents with evaluation sets: shared n-grams of words.

After Brown et al. 2020, appendix C: words are lower-cased runs of letters and digits; a document overlaps with an
item of an evaluation set if they share n consecutive words. A shorter item is compared as a whole, down to `MIN_WORDS`
(their lower limit too: shorter ones are everywhere); still shorter ones are counted and not compared.

Words and n-grams are compared by 64-bit hashes, which are the same in every process: every overlap is found, and a
false one occurs about once in 2**64 / (n-grams of the sets) n-grams.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from inheritune_ds.errors import CorpusError

Hashes = npt.NDArray[np.uint64]
Hits = dict[int, list[int]]
"""Number of an evaluation set -> numbers of the overlapping items."""

MIN_WORDS = 8
"""Shorter items are not compared."""

_CHUNK_CHARACTERS = 2**17
_BREAK = re.compile(r"[\W_]")
_CODE_POINTS = 0x110000
_BASE = np.uint64(0x9E3779B97F4A7C15)
_BASE_INVERSE = np.uint64(pow(int(_BASE), -1, 2**64))
_THREE, _SEVEN = np.uint64(3), np.uint64(7)
_WORD_BASE = 0xD1342543DE82EF95


class _Set(NamedTuple):
    name: str
    first: int
    items: int
    too_short: int


class _Table:
    """Hashes of the n-grams of one length, and the items that contain them."""

    def __init__(self, hashes: list[Hashes], owners: list[int]) -> None:
        every = np.concatenate(hashes)
        owner_of = np.repeat(np.array(owners, np.int64), [len(found) for found in hashes])
        order = np.lexsort((owner_of, every))
        self._hashes, self._owners = every[order], owner_of[order]
        # Most n-grams of a document are in no set: a table of bits, small enough for a CPU cache, filters them.
        bits = max(16, (16 * len(every)).bit_length())
        self._shift = np.uint64(64 - bits)
        seen = np.zeros(2**bits, np.bool_)
        seen[self._hashes >> self._shift] = True
        self._seen = np.packbits(seen, bitorder="little")

    def owners_of(self, grams: Hashes) -> Iterator[int]:
        places = grams >> self._shift
        bits = self._seen[places >> _THREE] >> (places & _SEVEN).astype(np.uint8)
        likely = grams[(bits & 1).astype(np.bool_)]
        starts, ends = (np.searchsorted(self._hashes, likely, side) for side in ("left", "right"))
        for start, end in zip(starts[starts < ends], ends[starts < ends], strict=True):
            yield from self._owners[start:end].tolist()


@dataclass(frozen=True)
class OverlapIndex:
    """The n-grams of evaluation sets; `tables` has those of `ngram` words and of the lengths of shorter items."""

    ngram: int
    sets: tuple[_Set, ...]
    tables: Mapping[int, _Table] = field(repr=False)

    @classmethod
    def build(cls, sets: Mapping[str, Iterable[str]], ngram: int) -> Self:
        """Index evaluation sets, name -> texts of the items; raise a CorpusError if a set has no item to compare."""
        read: list[_Set] = []
        found: dict[int, tuple[list[Hashes], list[int]]] = {}
        owner, fewest = 0, min(MIN_WORDS, ngram)
        for name, texts in sets.items():
            first, short = owner, 0
            for text in texts:
                words = np.concatenate([_NO_WORDS, *_word_hashes(text)])
                length = min(len(words), ngram)
                if length < fewest:
                    short += 1
                else:
                    hashes, owners = found.setdefault(length, ([], []))
                    hashes.append(next(grams for size, grams in _ngrams(words, length) if size == length))
                    owners.append(owner)
                owner += 1
            if owner - first == short:
                raise CorpusError(
                    f"evaluation set {name!r} has nothing to compare documents with: none of its {short} items has "
                    f"{fewest} words",
                    allowed=f"items of at least {fewest} words",
                    action="set another text_field of this set in corpus.overlap_with, or remove the set",
                )
            read.append(_Set(name, first, owner - first, short))
        return cls(ngram, tuple(read), {length: _Table(*of_length) for length, of_length in sorted(found.items())})

    def find(self, text: str) -> Hits:
        """Return the items that a document overlaps with, ascending; empty for most documents."""
        owners: set[int] = set()
        last = _NO_WORDS
        for words in _word_hashes(text):
            # N-grams may begin in the last words of a chunk.
            together = np.concatenate([last, words])
            for length, grams in _ngrams(together, self.ngram):
                if length in self.tables:
                    owners.update(self.tables[length].owners_of(grams))
            last = together[max(0, len(together) - self.ngram + 1) :]
        hits: Hits = {}
        for owner in sorted(owners):
            number = next(n for n, known in enumerate(self.sets) if owner < known.first + known.items)
            hits.setdefault(number, []).append(owner - self.sets[number].first)
        return hits


class OverlapCounter:
    """Counts documents with overlap, and the items they overlap with; continues from `kept`, an earlier `state`."""

    def __init__(self, index: OverlapIndex, kept: Mapping[str, Any] | None = None) -> None:
        self._sets = index.sets
        self._ngram = index.ngram
        documents, items = (kept or {}).get("documents", {}), (kept or {}).get("items", {})
        self._documents = [int(documents.get(str(number), 0)) for number in range(len(self._sets))]
        self._items: list[set[int]] = [set(items.get(str(number), ())) for number in range(len(self._sets))]

    def add(self, hits: Hits) -> None:
        """Count one document by the result of `OverlapIndex.find`."""
        for number, items in hits.items():
            self._documents[number] += 1
            self._items[number].update(items)

    def state(self) -> dict[str, Any]:
        """All counts so far, for JSON."""
        return {
            "documents": {str(number): count for number, count in enumerate(self._documents)},
            "items": {str(number): sorted(items) for number, items in enumerate(self._items)},
        }

    def as_dict(self) -> dict[str, dict[str, int]]:
        """Counts by set: its items, those too short to compare, items hit, documents with a hit."""
        return {
            name: {
                "ngram": self._ngram,
                "items": items,
                "items_too_short": too_short,
                "items_hit": len(hit),
                "documents_hit": documents,
            }
            for (name, _, items, too_short), hit, documents in zip(
                self._sets, self._items, self._documents, strict=True
            )
        }


_NO_WORDS: Hashes = np.zeros(0, np.uint64)


def _word_hashes(text: str) -> Iterator[Hashes]:
    """Yield hashes of the words of a text, a chunk at a time; a word shorter than a chunk is never cut."""
    start = 0
    while start < len(text):
        end = start + _CHUNK_CHARACTERS
        if end < len(text):
            gap = _BREAK.search(text, end, end + _CHUNK_CHARACTERS)
            end = gap.end() if gap else end + _CHUNK_CHARACTERS
        # The form of a lower-case sigma depends on the next letter, which may be in the next chunk.
        yield _chunk_hashes(text[start:end].lower().replace("ς", "σ"))  # noqa: RUF001  a sigma is meant
        start = end


def _chunk_hashes(text: str) -> Hashes:
    """Hash of each word: sum of code point x base**(position in the word), mixed."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    inside = _word_characters()[points]
    starts = np.flatnonzero(inside & ~np.concatenate([[False], inside[:-1]]))
    if not len(starts):
        return _NO_WORDS
    powers, inverses = _powers()
    values = points * inside * powers[: len(points)]
    return _mix(np.add.reduceat(values, starts) * inverses[starts])


def _ngrams(words: Hashes, longest: int) -> Iterator[tuple[int, Hashes]]:
    """Yield (n, hashes of all n consecutive words) for n from 1 to `longest`, if there are as many words."""
    sums = words
    for length in range(1, min(longest, len(words)) + 1):
        if length > 1:
            sums = sums[:-1] + words[length - 1 :] * np.uint64(pow(_WORD_BASE, length - 1, 2**64))
        yield length, sums


def _mix(hashes: Hashes) -> Hashes:
    """Mix every bit into all others (the finalizer of SplitMix64, Steele et al. 2014)."""
    mixed = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@cache
def _word_characters() -> npt.NDArray[np.bool_]:
    """Whether a code point is a letter or digit."""
    return np.fromiter((chr(point).isalnum() for point in range(_CODE_POINTS)), np.bool_, _CODE_POINTS)


@cache
def _powers() -> tuple[Hashes, Hashes]:
    """Powers of the base from 0 on, and their inverses, modulo 2**64."""
    count = 4 * _CHUNK_CHARACTERS  # a chunk has up to two times as many, and lower() makes two of one at most
    first = np.ones(1, np.uint64)
    powers, inverses = (
        np.concatenate([first, np.cumprod(np.full(count - 1, base, np.uint64), dtype=np.uint64)])
        for base in (_BASE, _BASE_INVERSE)
    )
    return powers, inverses
