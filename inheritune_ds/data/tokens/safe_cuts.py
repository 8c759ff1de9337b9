r"""Where a text can be cut so that its pieces, encoded separately, give the ids of the whole.

A tokenizer finds added tokens, normalizes the text between them, splits it with a pre-tokenizer, and turns each split
into ids with a model. A cut is exact if every step does the same on both sides as without the cut. This is proven for:

- Added tokens: special ones are not searched for (`TextEncoder` disables this). The others are plain strings here
  (no stripping, no `single_word`), so a cut outside all of them changes nothing.
- Normalizers in `_LOCAL_NORMALIZERS`: they change a character depending on its neighbors only: a sequence of combining
  characters, a run of spaces, the ends of the text. The 64 characters on either side are normalized together and
  separately, and must give the same. Steps for the front of a text alone (Prepend, Strip) are removed from the
  tokenizer of later pieces (`continued`).
- `WordEnds`, a split expression of `_SPLIT_EXPRESSIONS`: it matches from left to right, each match begins at the end
  of the last one, and it looks ahead by one character and never back. No alternative continues from a letter or digit
  to white space, or from a letter to one of `_MARKS`; so with or without the rest of the text, a match ends there
  and the next one begins. The only look-ahead, `(?!\S)`, is behind white space, and no cut is. The model
  sees one split at a time.
- `UnmergedPairs`, a BPE model that sees the text whole (LLaMA's). A token across the cut xy needs a merge of a symbol
  that ends in x with one that begins with y. If the model has no such merge, no symbol ever spans the cut, and merges
  on one side do not wait for the other: merges are ordered by rank, then position, and each changes only its
  neighbors.

In addition, the text around each cut is encoded together and separately to check all this.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

CONTEXT_CHARACTERS = 64
"""Length of the text on either side of a cut that is checked."""

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
"""The same as tiktoken's cl100k_base."""
_QWEN_2 = rf"{_CONTRACTIONS}|{_FRONT}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_O200K = (
    rf"{_FRONT}[{_UPPER}]*[{_LOWER}]+{_CONTRACTIONS}?|{_FRONT}[{_UPPER}]+[{_LOWER}]*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_SPLIT_EXPRESSIONS = {_GPT2, _LLAMA_3, _QWEN_2, _O200K}
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class WordEnds:
    """Cuts behind a letter or digit before a space, line end or mark, for a known split expression."""

    def candidates(self, text: str, start: int, end: int) -> Iterator[int]:
        """Yield the ends of words."""
        return (match.end() for match in _WORD_END.finditer(text, start, end))

    def allows(self, left: str, right: str) -> bool:
        """Whether the seam is still the end of a word after normalization."""
        return _WORD_END.match(left[-1:] + right[:1]) is not None


class UnmergedPairs:
    """Cuts between two characters that no merge of a BPE model joins; `space` is the model's form of a space."""

    def __init__(self, model: Mapping[str, Any], space: str) -> None:
        self._joined = {left[-1] + right[0] for left, right in model["merges"]}
        self._known = None if model.get("byte_fallback") else {piece for piece in model["vocab"] if len(piece) == 1}
        self._space = space

    def candidates(self, text: str, start: int, end: int) -> Iterator[int]:
        """Yield positions between characters that no merge joins."""
        return (
            place
            for place in range(start + 1, end)
            if text[place - 1 : place + 1].replace(" ", self._space) not in self._joined
        )

    def allows(self, left: str, right: str) -> bool:
        """Whether no merge joins the characters at the seam; two unknown ones may be fused."""
        pair = (left[-1:] + right[:1]).replace(" ", self._space)
        if len(pair) < 2 or pair in self._joined:
            return False
        return self._known is None or pair[0] in self._known or pair[1] in self._known


Rule = WordEnds | UnmergedPairs


def rule_of(spec: Mapping[str, Any]) -> Rule | None:
    """Select the proven rule for a parsed tokenizer JSON; None if there is none."""
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
    """Return the tokenizer (a parsed JSON) of later pieces, which does nothing special at the front of a text."""
    normalizers = [
        {**step, "pattern": {"Regex": r" +\z"}} if step.get("pattern") == {"Regex": r"\A +| +\z"} else step
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
    """Checks a cut by the text around it, with the normalizer, encoder and searched added tokens of later pieces."""

    def __init__(
        self, normalize: Callable[[str], str], encode: Callable[[str], list[int]], added: Iterable[str]
    ) -> None:
        self._normalize = normalize
        self._encode = encode
        self._added = {form for token in added for form in (token, normalize(token)) if len(form) > 1}

    def holds(self, rule: Rule | None, text: str, cut: int) -> bool:
        """Whether a text can be cut at `cut`; without a rule, whether no check fails."""
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


def _steps(part: Mapping[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """Steps of a normalizer or pre-tokenizer, with sequences flattened."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for nested in part[inner] for step in _steps(nested, inner)]
    return [dict(part)]


def _joined(part: Mapping[str, Any] | None, inner: str, steps: list[dict[str, Any]]) -> Mapping[str, Any] | None:
    """Join steps into a sequence; the part itself if they are unchanged."""
    if steps == _steps(part, inner):
        return part
    return {"type": "Sequence", inner: steps}


def _has_plain_tokens(spec: Mapping[str, Any]) -> bool:
    """Whether the added tokens that are searched for are plain strings."""
    tokens = [token for token in spec["added_tokens"] if not token["special"]]
    # Text behind an added token gets its own prefix, which the tokenizer of later pieces would not add.
    return not tokens or (
        continued(spec) == spec
        and not any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in tokens)
    )


def _merges_characters(model: Mapping[str, Any]) -> bool:
    """Whether ids come from merges of characters alone: no affixes, whole words, or merges of byte tokens."""
    if any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")):
        return False
    return not any(_BYTE_TOKEN.fullmatch(part) for merge in model["merges"] for part in merge)


def _is_local(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Replace":
        pattern = step["pattern"]
        return len(pattern.get("String", "")) == 1 or pattern.get("Regex") in _LOCAL_REPLACEMENTS
    return step["type"] in _LOCAL_NORMALIZERS


def _without_prefix(step: dict[str, Any]) -> dict[str, Any]:
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    if step["type"] == "ByteLevel":
        return {**step, "add_prefix_space": False}
    return step


def _splits_words(splits: list[dict[str, Any]]) -> bool:
    """Whether a known expression splits the text, preceded only by splits around single characters."""
    for split in splits:
        if split["type"] in ("Digits", "Punctuation"):
            continue
        if split["type"] == "ByteLevel":
            return bool(split["use_regex"])
        known = split["type"] == "Split" and split["pattern"].get("Regex") in _SPLIT_EXPRESSIONS
        return known and split["behavior"] == "Isolated" and not split["invert"]
    return False
