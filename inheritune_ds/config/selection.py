"""Which blocks of the reference are kept, and in which order: the grammar of `select`.

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
of order. The scores of `by:` are numbers that an analysis of the reference has measured, one a block.
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
_COUNTED = ("first", "last", "every", "even")
_RANGED = ("range", "drop")
_NUMBER = re.compile(r"[0-9]{1,18}")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Selection:
    """A parsed selection; `parse` makes it.

    Attributes:
        text: As it was written.
        kind: first, last, range, every, even, drop, by or list.
        ranges: Pairs (a, b) of a range, drop or list, both ends included.
        count: The n or k of the other kinds; 0 without one.
        score: Name of the scores (`by`).
    """

    text: str
    kind: str
    ranges: tuple[tuple[int, int], ...] = ()
    count: int = 0
    score: str = ""

    def blocks(self, depth: int, scores: Mapping[str, Sequence[float]] | None = None) -> tuple[int, ...]:
        """Indices of the kept blocks in the reference, in the target's order.

        Args:
            depth: Number of blocks of the reference.
            scores: Measured scores by name, one number a block; needed for `by:` only. Of equal scores the
                earlier block is kept.

        Raises:
            SurgeryError: If the selection does not fit that depth, or its scores are not there.
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
        """Check that the scores are there that `by:` goes by, as far as that can be said without the depth.

        Raises:
            SurgeryError: If they are not.
        """
        if self.kind == "by" and self.score not in scores:
            raise SurgeryError(
                f"select {self.text}: no scores named {self.score!r} were given",
                allowed=f"one of {', '.join(sorted(scores))}" if scores else "",
                action='measure them and give the file with block_scores: {"NAME": [one number a block]}, '
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
    """Read a selection.

    Raises:
        RecipeError: Pointing at the character that cannot be read.
    """
    head, colon, rest = text.partition(":")
    start = len(head) + 1
    if not colon:
        return Selection(text, "list", ranges=_list(text))
    if head in _COUNTED:
        count, end = _number(text, start)
        _check_end(text, end)
        return Selection(text, head, count=_positive(text, count, start))
    if head in _RANGED:
        pair, end = _range(text, start, required=True)
        _check_end(text, end)
        return Selection(text, head, ranges=(pair,))
    if head == "by":
        name = _NAME.match(rest)
        if name is None:
            raise _refusal(text, start, "a score's name, such as rank or influence")
        end = start + name.end()
        if text[end : end + 1] != ":":
            raise _refusal(text, end, "':' and a number of blocks")
        count, stop = _number(text, end + 1)
        _check_end(text, stop)
        return Selection(text, "by", count=_positive(text, count, end + 1), score=name.group())
    nearest = difflib.get_close_matches(head, [*_COUNTED, *_RANGED, "by"], n=1)
    raise _refusal(text, 0, f"'{nearest[0]}:'" if nearest else "a form or a block's number")


def _list(text: str) -> tuple[tuple[int, int], ...]:
    if text and not text[0].isdigit():
        nearest = difflib.get_close_matches(text, [*_COUNTED, *_RANGED, "by"], n=1)
        raise _refusal(text, 0, f"'{nearest[0]}:' and a number" if nearest else "a form or a block's number")
    ranges, end = [], -1
    while end < len(text):
        pair, end = _range(text, end + 1, required=False)
        ranges.append(pair)
        if end < len(text) and text[end] != ",":
            raise _refusal(text, end, "',' or '-'" if pair[0] == pair[1] else "','")
    return tuple(ranges)


def _range(text: str, start: int, *, required: bool) -> tuple[tuple[int, int], int]:
    """Read `a-b`, or `a` alone unless the dash is required; return the pair and where it ends."""
    first, end = _number(text, start)
    if text[end : end + 1] != "-":
        if required:
            raise _refusal(text, end, "'-' and the last block")
        return (first, first), end
    last, stop = _number(text, end + 1)
    if last < first:
        raise _refusal(text, end + 1, f"a block not before {first}")
    return (first, last), stop


def _number(text: str, start: int) -> tuple[int, int]:
    match = _NUMBER.match(text, start)
    if match is None:
        raise _refusal(text, start, "a number")
    return int(match.group()), match.end()


def _positive(text: str, count: int, start: int) -> int:
    if count == 0:
        raise _refusal(text, start, "a number of at least 1")
    return count


def _check_end(text: str, end: int) -> None:
    if end < len(text):
        raise _refusal(text, end, "nothing more")


def _refusal(text: str, position: int, expected: str) -> RecipeError:
    return RecipeError(
        f"select: {text!r} cannot be read at character {position + 1}: {expected} expected\n"
        f"      {text}\n      {' ' * position}^",
        allowed=ALLOWED,
    )
