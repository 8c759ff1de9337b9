"""Blocks of the reference to keep, and their order: the grammar of `select`.

    first:n      the first n blocks                       first:13
    last:n       the last n                               last:2
    range:a-b    blocks a to b, both included             range:4-11
    every:k      blocks 0, k, 2k, ...                     every:2
    even:n       the first and the last, the other n - 2  even:6
                 evenly spaced between them
    drop:a-b     all but the blocks a to b                drop:20-25
    by:name:n    the n blocks with the highest scores,    by:rank:13
                 in the reference's order
    a,b-c,...    the blocks named, in the order written   0-7,20-23   0-8,0-8

Blocks count from 0. Only a list may name a block more than once (`0-8,0-8` is hybrid stacking) or out
of order. The scores of `by:` come from an analysis of the reference, one per block.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from inheritune_ds.errors import RecipeError, SurgeryError

ALLOWED = (
    "first:n, last:n, range:a-b, every:k, even:n, drop:a-b, by:SCORE:n, or a list of blocks such as 0-7,20-23; "
    "blocks count from 0, both ends of a-b are included"
)
_NUMBER = ("[0-9]{1,18}", "a number")
_RANGE = (_NUMBER, ("-", "'-' and the last block"), _NUMBER)
_NAME = ("[A-Za-z][A-Za-z0-9_-]*", "a score's name, such as rank or influence")
_FORMS = {
    **dict.fromkeys(("first", "last", "every", "even"), (_NUMBER,)),
    **dict.fromkeys(("range", "drop"), _RANGE),
    "by": (_NAME, (":", "':' and a number of blocks"), _NUMBER),
}
"""The text after the colon of a form, piece by piece: a regular expression and its name in messages."""


@dataclass(frozen=True)
class Selection:
    """A parsed selection."""

    text: str
    kind: str
    """A key of `_FORMS`, or list."""
    ranges: tuple[tuple[int, int], ...] = ()
    """Pairs (a, b) of a range, drop or list, both ends included."""
    count: int = 0
    """The n or k of the other kinds."""
    score: str = ""
    """Name of the scores (`by`)."""

    def blocks(self, depth: int, scores: Mapping[str, Sequence[float]] | None = None) -> tuple[int, ...]:
        """Indices of the kept blocks in a reference of so many blocks (`depth`), in the target's order.

        `scores` for `by:` have a name, and a number per block; of equal scores the earlier block is kept.

        Raises:
            SurgeryError: If the selection does not fit that depth, or its scores are missing.
        """
        if self.kind in ("range", "drop", "list"):
            self._check_ranges(depth)
        else:
            self._check_count(depth)
        named = [block for first, last in self.ranges for block in range(first, last + 1)]
        kept: Iterable[int] = named
        match self.kind:
            case "first":
                kept = range(self.count)
            case "last":
                kept = range(depth - self.count, depth)
            case "every":
                kept = range(0, depth, self.count)
            case "even":
                gaps = self.count - 1  # i * (depth - 1) / gaps, rounded half up in whole numbers
                kept = ((2 * i * (depth - 1) + gaps) // (2 * gaps) for i in range(self.count))
            case "by":
                kept = self._best(depth, scores or {})
            case "drop":
                kept = (block for block in range(depth) if block not in named)
        return tuple(kept)

    def _check_count(self, depth: int) -> None:
        least = 2 if self.kind == "even" else 1
        if self.kind == "even" and depth < 2:
            raise SurgeryError(f"select {self.text}: even:n needs at least 2 blocks, the reference has {depth}")
        if not least <= self.count <= depth:
            form = self.text[: self.text.rindex(":") + 1]
            raise SurgeryError(
                f"select {self.text}: {self.count} is not possible, the reference has {depth} block{'s' * (depth > 1)}",
                allowed=f"{form}{least} to {form}{depth}" if depth > least else f"{form}{depth}",
                action=f"select=first:{depth // 2} keeps half of the blocks, the method's default" if depth > 1 else "",
            )

    def _check_ranges(self, depth: int) -> None:
        for first, last in self.ranges:
            if last >= depth:
                raise SurgeryError(
                    f"select {self.text}: the reference has no block {last if first < depth else first}",
                    allowed=f"blocks 0 to {depth - 1}",
                )
        if self.kind == "drop" and self.ranges == ((0, depth - 1),):
            raise SurgeryError(
                f"select {self.text}: this drops all {depth} blocks of the reference",
                allowed="at least one block is kept",
            )

    def check_scores(self, scores: Mapping[str, Sequence[float]]) -> None:
        """Raise SurgeryError if the scores of `by:` are missing; this needs no depth."""
        if self.kind == "by" and self.score not in scores:
            raise SurgeryError(
                f"select {self.text}: no scores named {self.score!r} were given",
                allowed=f"one of {', '.join(sorted(scores))}" if scores else "",
                action='measure them and give the file with block_scores: {"NAME": [one number per block]}, '
                "or name the blocks in a list",
            )

    def _best(self, depth: int, scores: Mapping[str, Sequence[float]]) -> list[int]:
        self.check_scores(scores)
        values = scores[self.score]
        if len(values) != depth:
            raise SurgeryError(
                f"select {self.text}: {len(values)} scores named {self.score!r}, but the reference has {depth} blocks",
                allowed=f"{depth} numbers, block 0 first",
            )
        best = sorted(range(depth), key=lambda block: (-values[block], block))[: self.count]
        return sorted(best)


def parse(text: str) -> Selection:
    """Parse a selection; raise a RecipeError with a caret at the first invalid character."""
    form, colon, _ = text.partition(":")
    if not colon and (not text or text[0].isdigit()):
        return Selection(text, "list", ranges=_list(text))
    if not colon or form not in _FORMS:
        nearest = difflib.get_close_matches(form, _FORMS, n=1)
        expected = f"'{nearest[0]}:'" + " and a number" * (not colon) if nearest else "a form or a block's number"
        raise _refusal(text, 0, expected)
    found = _read(text, len(form) + 1, len(text), _FORMS[form], "nothing more")
    if _FORMS[form] is _RANGE:
        return Selection(text, form, ranges=(_pair(text, found[0], found[-1]),))
    count = found[-1]
    if int(count[0]) == 0:
        raise _refusal(text, count.start(), "a number of at least 1")
    return Selection(text, form, count=int(count[0]), score=found[0][0] if form == "by" else "")


def _list(text: str) -> tuple[tuple[int, int], ...]:
    ranges, start = [], 0
    for item in text.split(","):
        pieces, after = (_RANGE, "','") if re.match("[0-9]+-", item) else ((_NUMBER,), "',' or '-'")
        found = _read(text, start, start + len(item), pieces, after)
        ranges.append(_pair(text, found[0], found[-1]))
        start += len(item) + 1
    return tuple(ranges)


def _read(text: str, start: int, end: int, pieces: Sequence[tuple[str, str]], after: str) -> list[re.Match[str]]:
    """Match pieces one after the other from start to end; `after` is the expected text at the end in a message."""
    found: list[re.Match[str]] = []
    for pattern, expected in pieces:
        match = re.compile(pattern).match(text, start, end)
        if match is None:
            raise _refusal(text, start, expected)
        found.append(match)
        start = match.end()
    if start < end:
        raise _refusal(text, start, after)
    return found


def _pair(text: str, first: re.Match[str], last: re.Match[str]) -> tuple[int, int]:
    if int(last[0]) < int(first[0]):
        raise _refusal(text, last.start(), f"a block not before {int(first[0])}")
    return int(first[0]), int(last[0])


def _refusal(text: str, position: int, expected: str) -> RecipeError:
    return RecipeError(
        f"select: {text!r} cannot be read at character {position + 1}: {expected} expected\n"
        f"      {text}\n      {' ' * position}^",
        allowed=ALLOWED,
    )
