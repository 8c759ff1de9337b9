r"""Where a long text may be cut so that its parts, encoded one by one, give the ids of the whole.

A tokenizer works in four steps: added tokens are looked for, the text between them is normalized, a
pre-tokenizer splits it, and a model makes ids of each split. A cut is exact if every step does the
same on both sides of it as without it. What is proven here, and for which tokenizers:

- Added tokens: special ones are not looked for (`pieces.TextEncoder` says so to the backend). The
  others are plain strings here (no stripping, no `single_word`), so a cut that none of them lies
  across changes nothing.
- Normalizer: its steps (`_LOCAL_NORMALIZERS`) change a character by its neighbours only: a sequence
  of combining characters, a run of spaces, the ends of the text. The text of 64 characters on either
  side is normalized whole and in two, and must give the same. What a step does to the front of a
  text alone (Prepend, Strip) is taken out of the tokenizer of later pieces (`continued`).
- Pre-tokenizer and model, `WordEnds`: a split expression of `_SPLIT_EXPRESSIONS`. It is matched from left
  to right, each match begins where the last one ended, and it looks ahead by one character and never
  back. None of its alternatives goes on from a letter or digit to white space, or from a letter to one
  of the marks in `_MARKS`; so a match ends at such a place, with or without the rest of the text, and the
  next one begins there. The only look ahead, `(?!\S)`, is behind white space, and no cut is. The model
  sees one split at a time.
- `UnmergedPairs`: a BPE model that sees the text whole (LLaMA's). A piece that lies across the cut xy
  would need a merge of something that ends in x with something that begins with y. If no merge of the
  model does, no symbol ever spans the cut, and merges on one side do not wait for the other: the
  order of merges is by rank, then position, and each changes its own neighbours only.

Added to that, the text around each cut is encoded whole and in two as a check of all this.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

CONTEXT_CHARACTERS = 64
"""On either side of a cut, for the checks."""

_MARKS = ",.;:!?，。；：！？、"  # noqa: RUF001  the full-width forms are meant
_WORD_END = re.compile(rf"[^\W_](?=[ \n])|[^\W\d_](?=[{_MARKS}])")
_LOCAL_NORMALIZERS = {"Prepend", "Replace", "Precompiled", "NFC", "NFD", "NFKC", "NFKD", "Lowercase"}
_LOCAL_REPLACEMENTS = {r"\A +| +\z", r" +\z", " {2,}"}
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_FRONT = r"[^\r\n\p{L}\p{N}]?"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA_3 = rf"{_CONTRACTIONS}|{_FRONT}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
"""As tiktoken's cl100k_base."""
_QWEN_2 = rf"{_CONTRACTIONS}|{_FRONT}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_O200K = (
    rf"{_FRONT}[{_UPPER}]*[{_LOWER}]+{_CONTRACTIONS}?|{_FRONT}[{_UPPER}]+[{_LOWER}]*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_SPLIT_EXPRESSIONS = {_GPT2, _LLAMA_3, _QWEN_2, _O200K}
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Rule(Protocol):
    """Where the pre-tokenizer and the model allow a cut."""

    def candidates(self, text: str, start: int, end: int) -> Iterator[int]:
        """Yield places between `start` and `end` at which the text may be cut, as its raw characters say."""

    def allows(self, left: str, right: str) -> bool:
        """Whether two normalized texts can be encoded apart."""


class WordEnds:
    """Cuts behind a letter or digit before a space, line end or mark: a known split expression."""

    def candidates(self, text: str, start: int, end: int) -> Iterator[int]:
        """Yield the ends of words."""
        return (match.end() for match in _WORD_END.finditer(text, start, end))

    def allows(self, left: str, right: str) -> bool:
        """Whether the seam is the end of a word after normalization too."""
        return _WORD_END.match(left[-1:] + right[:1]) is not None


class UnmergedPairs:
    """Cuts between two characters that no merge of a BPE model joins.

    Args:
        model: The `model` part of a tokenizer's JSON.
        space: What a space is by the time the model sees it.
    """

    def __init__(self, model: Mapping[str, Any], space: str) -> None:
        self._joined = {left[-1] + right[0] for left, right in model["merges"]}
        self._known = None if model.get("byte_fallback") else {piece for piece in model["vocab"] if len(piece) == 1}
        self._space = space

    def candidates(self, text: str, start: int, end: int) -> Iterator[int]:
        """Yield places between characters that are not joined as they stand."""
        return (
            place
            for place in range(start + 1, end)
            if text[place - 1 : place + 1].replace(" ", self._space) not in self._joined
        )

    def allows(self, left: str, right: str) -> bool:
        """Whether the two characters at the seam are not joined; two unknown ones may be fused to one."""
        pair = (left[-1:] + right[:1]).replace(" ", self._space)
        if len(pair) < 2 or pair in self._joined:
            return False
        return self._known is None or pair[0] in self._known or pair[1] in self._known


def rule_of(spec: Mapping[str, Any]) -> Rule | None:
    """Choose the rule that is proven for a tokenizer; None if none is.

    Args:
        spec: A tokenizer's JSON, parsed.
    """
    model = spec["model"]
    local = all(_is_local(step) for step in _steps(spec["normalizer"], "normalizers"))
    if not local or not _has_plain_tokens(spec) or model["type"] != "BPE" or model.get("dropout"):
        return None
    splits = _steps(spec["pre_tokenizer"], "pretokenizers")
    if _splits_words(splits):
        return WordEnds()
    if [split["type"] for split in splits] in ([], ["Metaspace"]) and _merges_characters(model):
        return UnmergedPairs(model, splits[0]["replacement"] if splits else " ")
    return None


def continued(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tokenizer for text that follows other text: what is done to the front of a text is not done.

    Args:
        spec: A tokenizer's JSON, parsed; not changed.
    """
    normalizers = [
        {**step, "pattern": {"Regex": r" +\z"}} if _strips_front(step) else step
        for step in _steps(spec["normalizer"], "normalizers")
        if step["type"] != "Prepend"
    ]
    splits = [_without_prefix(step) for step in _steps(spec["pre_tokenizer"], "pretokenizers")]
    return {
        **spec,
        "normalizer": _joined(spec["normalizer"], "normalizers", normalizers),
        "pre_tokenizer": _joined(spec["pre_tokenizer"], "pretokenizers", splits),
    }


class Seams:
    """Judges a cut by the text around it.

    Args:
        normalize: The normalizer of text that follows other text.
        encode: The ids of text that follows other text.
        added: Added tokens that are looked for in a text.
    """

    def __init__(
        self, normalize: Callable[[str], str], encode: Callable[[str], list[int]], added: Iterable[str]
    ) -> None:
        self._normalize = normalize
        self._encode = encode
        self._added = {form for token in added for form in (token, normalize(token)) if len(form) > 1}

    def holds(self, rule: Rule | None, text: str, cut: int) -> bool:
        """Whether a text may be cut there; without a rule, whether nothing around the cut speaks against it."""
        left, right = text[max(0, cut - CONTEXT_CHARACTERS) : cut], text[cut : cut + CONTEXT_CHARACTERS]
        before, after = self._normalize(left), self._normalize(right)
        if rule is not None and not rule.allows(before, after):
            return False
        if self._normalize(left + right) != before + after:
            return False
        if self._lies_across(text, cut) or self._lies_across(before + after, len(before)):
            return False
        return self._encode(left + right) == self._encode(left) + self._encode(right)

    def _lies_across(self, text: str, cut: int) -> bool:
        return any(token in text[max(0, cut - len(token) + 1) : cut + len(token) - 1] for token in self._added)


def word_ends(text: str, start: int, end: int) -> Iterator[int]:
    """Yield the ends of words, where an unproven cut does least."""
    return WordEnds().candidates(text, start, end)


def _steps(part: Mapping[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """Steps of a normalizer or pre-tokenizer, sequences taken apart."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for nested in part[inner] for step in _steps(nested, inner)]
    return [dict(part)]


def _joined(part: Mapping[str, Any] | None, inner: str, steps: list[dict[str, Any]]) -> Mapping[str, Any] | None:
    """Put steps together again; the part itself if they are its own."""
    if steps == _steps(part, inner):
        return part
    return {"type": "Sequence", inner: steps}


def _has_plain_tokens(spec: Mapping[str, Any]) -> bool:
    """Whether the added tokens that are looked for are plain strings with nothing done around them."""
    tokens = [token for token in spec["added_tokens"] if not token["special"]]
    # Text behind an added token gets a prefix of its own, which the tokenizer of later pieces would not give.
    return not tokens or (
        continued(spec) == spec
        and not any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in tokens)
    )


def _merges_characters(model: Mapping[str, Any]) -> bool:
    """Whether ids come from merges of characters alone: no affixes, no whole words, no merges of byte tokens."""
    if any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")):
        return False
    return not any(_BYTE_TOKEN.fullmatch(part) for merge in model["merges"] for part in merge)


def _is_local(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Replace":
        pattern = step["pattern"]
        return len(pattern.get("String", "")) == 1 or pattern.get("Regex") in _LOCAL_REPLACEMENTS
    return step["type"] in _LOCAL_NORMALIZERS


def _strips_front(step: Mapping[str, Any]) -> bool:
    return bool(step["type"] == "Replace" and step["pattern"].get("Regex") == r"\A +| +\z")


def _without_prefix(step: dict[str, Any]) -> dict[str, Any]:
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    if step["type"] == "ByteLevel":
        return {**step, "add_prefix_space": False}
    return step


def _splits_words(splits: list[dict[str, Any]]) -> bool:
    """Whether a known expression splits the text, behind nothing but splits around single characters."""
    for split in splits:
        if split["type"] in ("Digits", "Punctuation"):
            continue
        if split["type"] == "ByteLevel":
            return bool(split["use_regex"])
        known = split["type"] == "Split" and split["pattern"].get("Regex") in _SPLIT_EXPRESSIONS
        return known and split["behavior"] == "Isolated" and not split["invert"]
    return False
